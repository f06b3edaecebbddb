"""What vzrepro puts into an audit's sandboxes, and the image in which it looks at differences: from its own recipes, so
that they are checked, audited and billed as the rest is."""

from vzrepro.recipes import audit_tools, diffoscope_image

AUDIT_TOOLS = audit_tools()

DIFFOSCOPE_IMAGE = diffoscope_image()
