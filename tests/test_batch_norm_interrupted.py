"""Exceptions that come at any moment, while a failed update_bn puts everything back too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor, nn

import fastswa
from tests.batch_norm import Net, assert_unchanged, batches, state, trained


class Interrupted(nn.BatchNorm2d):
    """Raises, when it is armed, at the first write of one attribute, as a signal's handler may."""

    armed: str | None = None

    def __setattr__(self, name: str, value: object) -> None:
        if name == self.armed:
            self.__dict__["armed"] = None
            raise KeyboardInterrupt("again")
        super().__setattr__(name, value)


@pytest.mark.parametrize("attribute", ["momentum", "training"])
def test_a_second_exception_changes_nothing_either(attribute: str) -> None:
    model = Net()
    model.norm = Interrupted(6)
    trained(model)

    def loader() -> Iterator[Tensor]:
        yield from batches(2)
        model.norm.__dict__["armed"] = attribute
        raise OSError("disk")

    before = state(model)
    with pytest.raises(KeyboardInterrupt, match="again"):
        fastswa.update_bn(loader(), model)
    assert_unchanged(model, before)


DYING_WORKER = """
import os, signal, time, torch, fastswa
from torch.utils.data import DataLoader, Dataset
from tests.batch_norm import Net, assert_unchanged, state, trained

class Dying(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.randn(1, 5, 5)

if __name__ == "__main__":
    model = trained(Net())
    before = state(model)
    failed = False
    try:
        try:
            fastswa.update_bn(DataLoader(Dying(), batch_size=8, num_workers=1), model)
        except (OSError, EOFError):
            # What the main process was reading broke off first; torch's handler may report the death yet.
            failed = True
            time.sleep(1)
    except RuntimeError:
        failed = True
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    assert failed
    assert_unchanged(model, before)
    print("as before")
"""


def test_a_worker_that_dies_changes_nothing(tmp_path: Path) -> None:
    # In a process of its own, because torch reports the death in a signal handler.
    script = tmp_path / "dying_worker.py"
    script.write_text(DYING_WORKER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.stdout == "as before\n", result.stderr
