"""The summary: who is ours, and whom ours is compared with."""

from __future__ import annotations

from typing import Any

from fastres.report.documents import Bench, Interval, Measurement, Paired
from fastres.report.findings import findings

PEERS = ("openvino", "eager")


def two_models(**changed: Any) -> Bench:
    """As `fastres bench` writes it: every target has its model's name before it."""
    measured, ratios, lanes = [], [], {}
    for model, own in (("fastres:a", 50.0), ("fastres:b", 30.0)):
        ours = f"{model} fastres"
        lanes[ours] = tuple(f"{model} {peer}" for peer in PEERS)
        measured.append(Measurement(ours, 1, own, "fp32", model, speedup=Interval(9.0, 8.0, 9.5)))
        for peer, rate, low, high in (("openvino", 60.0, 0.7, 0.9), ("eager", 10.0, 2.0, 4.0)):
            measured.append(Measurement(f"{model} {peer}", 1, rate, "fp32", model))
            speed = Interval((low + high) / 2, low, high)
            ratios.append(Paired(ours, f"{model} {peer}", 1, model, "fp32", speed))
    given = {"lanes": lanes, "ratios": tuple(ratios), "models": ("fastres:a", "fastres:b")}
    return Bench(tuple(measured), baseline="fastres:a openvino", **(given | changed))


def test_peers_are_no_ours_though_their_models_are() -> None:
    page = str(findings({"run": two_models()}))
    assert "2 slower, 2 faster" in page or "2 faster, 2 slower" in page
    assert "ahead of fastres" in page and "fastres:b openvino at batch 1" in page
    assert "fastres:b eager at batch 1" not in page
    rows = page.split("<tbody>")[1]
    # ours, not the fastest of all; over the fastest peer, not over the baseline of another model
    assert "50.0" in rows and "30.0" in rows and "0.8" in rows
    assert "fastres over the fastest peer" in page


def test_documents_without_lanes_go_by_names() -> None:
    old = two_models(lanes={}, ratios=())
    assert old.is_ours("fp32 fastres") and not old.is_ours("fp32 eager")
    assert "fastres over fastres:a openvino" in str(findings({"run": old}))


def test_a_ratio_without_an_interval_shows_no_difference() -> None:
    unknown = Paired("fastres:a fastres", "fastres:a eager", 1, "fastres:a", "fp32")
    page = str(findings({"run": two_models(ratios=(unknown,))}))
    assert "1 no difference shown" in page and "ahead of" not in page
