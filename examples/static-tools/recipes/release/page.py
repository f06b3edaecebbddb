"""Writes /out/<program>, /out/SHA256SUMS and /out/index.html from /in/<program>/<program> and /in/about.json."""

import hashlib
import html
import json
import shutil
from pathlib import Path

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Static tools</title>
<h1>Static tools</h1>
<table>
<tr><th>program</th><th>version</th><th>what it does</th><th>bytes</th><th>sha256</th></tr>
{rows}
</table>
</html>
"""

ROW = '<tr><td><a href="{0}">{0}</a></td><td>{1}</td><td>{2}</td><td>{3}</td><td><code>{4}</code></td></tr>'

out = Path("/out")
rows, sums = [], []
for name, known in sorted(json.loads(Path("/in/about.json").read_text()).items()):
    program = out / name
    shutil.copyfile(f"/in/{name}/{name}", program)
    program.chmod(0o555)
    data = program.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    cells = (name, known["version"], known["about"], str(len(data)), digest)
    rows.append(ROW.format(*map(html.escape, cells)))
    sums.append(f"{digest}  {name}\n")
(out / "index.html").write_text(PAGE.format(rows="\n".join(rows)))
(out / "SHA256SUMS").write_text("".join(sums))
