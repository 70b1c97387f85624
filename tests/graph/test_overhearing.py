"""What PyTorch prints while it exports is kept: nothing reaches stderr but by an error's words."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastres.errors import CaptureError
from fastres.graph.capture import capture
from fastres.graph.overhearing import overhearing
from fastres.options import Input

ModelOf = Callable[..., nn.Module]
RANGED = Input(((1, 3, 8, 8), (1, 3, 16, 16), (4, 3, 40, 40)))


def decides(m: Any, x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x  # by a value


def test_a_failed_export_says_one_thing(
    model_of: ModelOf, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CaptureError, match=r"test_overhearing.py:\d+") as caught:
        capture(model_of(decides), [RANGED])
    assert "x.sum() > 0" in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_network_that_makes_pytorch_log_pages(
    model_of: ModelOf, capfd: pytest.CaptureFixture[str]
) -> None:
    """Inequalities over rounded sizes, which sympy cannot solve."""
    pools = nn.Sequential(*(nn.MaxPool2d(2) for _ in range(3)), nn.MaxPool2d(2, ceil_mode=True))
    capture(model_of(lambda m, x: m.pools(x), pools=pools), [RANGED])
    assert capfd.readouterr() == ("", "")


def test_kept_of_one_thread_only(capfd: pytest.CaptureFixture[str]) -> None:
    stream = sys.stderr
    log = logging.getLogger("torch.test")

    def other() -> None:
        print("another thread", file=sys.stderr)
        sys.stderr.flush()

    with overhearing() as heard:
        print("mine", file=sys.stderr)
        log.warning("a warning")
        worker = threading.Thread(target=other)
        worker.start()
        worker.join()
        assert sys.stderr.isatty() == stream.isatty()  # all else is the stream's
    assert sys.stderr is stream
    assert "mine\n" in heard.text.getvalue() and "a warning\n" in heard.text.getvalue()
    assert capfd.readouterr().err == "another thread\n"
    assert heard.last_line == ""


def test_loggers_with_handlers_of_their_own(capfd: pytest.CaptureFixture[str]) -> None:
    """As the exporter's, which before PyTorch 2.14 keep the stderr that they were made with."""
    own = {
        logging.getLogger(name): logging.StreamHandler(sys.stderr)
        for name in ("torch.fx.experimental.symbolic_shapes", "torchless")
    }
    for logger, handler in own.items():
        logger.addHandler(handler)
    try:
        with overhearing() as heard:
            for logger in own:
                logger.warning(f"a warning of {logger.name}")
    finally:
        for logger, handler in own.items():
            logger.removeHandler(handler)
    assert "a warning of torch.fx" in heard.text.getvalue()
    assert capfd.readouterr().err == "a warning of torchless\n"
    assert not any(handler.filters for handler in own.values())


def test_a_process_without_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with overhearing():
        assert sys.stderr is None
    assert torch.is_tensor(torch.ones(1))
