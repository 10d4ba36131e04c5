"""What other machines could reach while a search runs here: nothing."""

import ipaddress
import os
import stat
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SPACE = """name: quiet
data: {{path: {data}}}
model: {{backbone: {{kind: mlp, hidden: [8]}}}}
optimizer: {{kind: adamw, lr: {{loguniform: [1.0e-4, 1.0e-2]}}}}
train: {{epochs: 25, batch_size: 8}}
search: {{trials: 2, workers_per_trial: 2, scheduler: {{kind: none}}, refit: false, controls: false}}
"""


def listening(root):
    """Addresses at which a process and its descendants listen, by their names."""
    found = set()
    for process in [root, *root.children(recursive=True)]:
        try:
            name, sockets = process.name(), process.net_connections("inet")
        except psutil.Error:
            continue  # it has ended
        found |= {(name, each.laddr.ip) for each in sockets if each.status == psutil.CONN_LISTEN}
    return found


def test_a_local_search_listens_on_loopback_alone(tmp_path, data_file, start_hiertune):
    (tmp_path / "space.yaml").write_text(SPACE.format(data=data_file))
    process = start_hiertune("search", "space.yaml")
    root, found = psutil.Process(process.pid), set()
    while process.poll() is None:
        found |= listening(root)
        time.sleep(0.5)
    assert process.wait() == 0, process.stdout.read()
    names = {name for name, _ in found}
    assert any("gcs_server" in name for name in names), names
    assert any("RayTrainWorker" in name or "ray::" in name for name in names), names
    outside = {(name, ip) for name, ip in found if not _is_loopback(ip)}
    assert not outside, outside
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"} & set(os.environ):
        token = Path.home() / ".ray" / "auth_token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600


def _is_loopback(ip):
    address = ipaddress.ip_address(ip)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
