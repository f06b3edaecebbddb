"""What audits need, pinned for every workspace by the lock that comes with vzrepro."""

from vzrepro.recipes import audit_tools, diffoscope_image

audit_tools()
diffoscope_image()
