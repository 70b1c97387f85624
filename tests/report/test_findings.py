"""The summary: who is ours, and whom ours is compared with."""

from __future__ import annotations

from typing import Any

from fastres.report.documents import Bench
from fastres.report.findings import findings
from fastres.report.records import Interval, Measurement, Paired

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
    assert "by 95 % intervals: 2 slower." in page  # over the fastest peers; eager is slower by far
    rows = page.split("<tbody>")[1].split("</tr>")
    # ours, not the fastest of all; over the fastest peer, not over the baseline of another model
    for model, own, row in zip(("a", "b"), ("50.0", "30.0"), rows, strict=False):
        assert f"fastres:{model} openvino" in row and f">{own}<" in row
        assert "<td>openvino</td>" in row and "0.800× [0.700, 0.900]" in row
    assert "fastres over that peer" in page and "9.00×" not in page


def test_a_peer_that_is_ahead_is_named() -> None:
    page = str(findings({"run": two_models()}))
    assert (
        "peers that are ahead of fastres: fastres:a openvino at batch 1 (fastres over it: 0.800× "
        "[0.700, 0.900]), fastres:b openvino at batch 1"
    ) in page
    assert "eager at batch 1" not in page and "no peer" not in page


def test_no_peer_is_ahead() -> None:
    eager = tuple(found for found in two_models().ratios if found.runtime == "eager")
    page = str(findings({"run": two_models(ratios=eager)}))
    assert "2 faster." in page and "no peer is shown to be ahead of fastres." in page


def test_the_fastest_peer_is_that_of_the_lane_and_the_batch() -> None:
    def paired(ours: str, peer: str, size: int, median: float | None) -> Paired:
        return Paired(ours, peer, size, speed=Interval(median, median, median))

    bench = Bench(
        (),
        ratios=(
            paired("x fastres", "x slow", 1, 3.0),
            paired("x fastres", "x unknown", 1, None),
            paired("x fastres", "x quick", 1, 1.5),
            paired("x fastres", "x other", 8, 1.1),
            paired("y fastres", "y other", 1, 0.5),
        ),
    )
    fastest = bench.fastest_peer("x fastres", 1)
    assert fastest is not None and fastest.runtime == "quick"
    assert bench.fastest_peer("x fastres", 2) is None


def test_documents_without_lanes_go_by_names() -> None:
    old = two_models(lanes={}, ratios=())
    assert old.is_ours("fp32 fastres") and not old.is_ours("fp32 eager")
    assert "fastres over fastres:a openvino" in str(findings({"run": old}))


def test_a_ratio_to_another_models_baseline_is_not_shown() -> None:
    page = str(findings({"run": two_models(ratios=())}))
    first, second, *_ = page.split("<tbody>")[1].split("</tr>")
    assert "9.00×" in first and "9.00×" not in second
    assert "by 95 % intervals: 1 faster" in page


def test_without_peers_there_is_nothing_to_compare_with() -> None:
    page = str(findings({"run": two_models(ratios=(), lanes={"fastres:a fastres": ()})}))
    assert "images per second" in page and "fastest" not in page and "fastres over" not in page


def test_a_ratio_without_an_interval_shows_no_difference() -> None:
    unknown = Paired("fastres:a fastres", "fastres:a eager", 1, "fastres:a", "fp32")
    page = str(findings({"run": two_models(ratios=(unknown,))}))
    assert "1 no difference shown" in page and "are ahead of" not in page
