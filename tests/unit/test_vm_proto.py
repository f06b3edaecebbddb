"""The generated protobuf module is what protoc makes of the agent's .proto today.

To generate it again:

    python -m grpc_tools.protoc -I recipes/guest-agent/proto/vz/agent/v1 \\
        --python_out=vzrepro/guest/vm --pyi_out=vzrepro/guest/vm agent.proto
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["agent_pb2.py", "agent_pb2.pyi"])
def test_generating_again_gives_the_same(tmp_path: Path, name: str) -> None:
    proto = ROOT / "recipes/guest-agent/proto/vz/agent/v1"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{proto}", f"--python_out={tmp_path}"]
    subprocess.run([*command, f"--pyi_out={tmp_path}", "agent.proto"], check=True)
    assert (tmp_path / name).read_text() == (ROOT / "vzrepro/guest/vm" / name).read_text(), (
        "the agent's .proto and vzrepro/guest/vm/agent_pb2 differ: run the command in this file's docstring"
    )
