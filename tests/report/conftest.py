"""Documents of results, written by hand in the shape that fastres bench gives them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

Document = dict[str, Any]
MODELS = ("fastres:resnet50@v1", "fastres:resnet50@v1.5")
SPEEDS = {  # over the slowest; a lane has a peer of its own kind in each precision
    "fp32": {"fastres": 1.9, "eager": 1.0, "openvino": 1.85},
    "int8": {"fastres": 1.9, "nncf": 2.2, "onnxruntime": 1.3},
}
OURS = f"{MODELS[0]} fp32 fastres"
MACHINE = {
    "cpu": "Imaginary(R) Processor 9000",
    "cores": 2,
    "threads": 2,
    "gpu": None,
    "versions": {"python": "3.11.7", "torch": "2.15.0", "openvino": "2026.4.1"},
    "state": {"governor": "performance", "load": "0.4"},
}
RUN = {
    "argv": ["/usr/bin/fastres", "bench", *MODELS, "--batch-size", "1,8", "-o", "a b"],
    "commit": "0123abc",
    "date": "2026-11-23T12:00:00+00:00",
    "seconds": 321.5,
    "duration_s": 3.0,
    "launches": 3,
    "transfers": "not included",
    "input": [3, 224, 224],
    "finished": True,
}


@pytest.fixture
def bench_document() -> Document:
    """Two models in two precisions at two batch sizes, with everything else that there can be."""
    draw = random.Random(0)
    measurements = [
        _measurement(draw, model, precision, size, name)
        for size in (1, 8)
        for model in MODELS
        for precision, speeds in SPEEDS.items()
        for name in speeds
    ]
    lanes = {
        f"{model} {precision} fastres": [
            f"{model} {precision} {name}" for name in speeds if name != "fastres"
        ]
        for model in MODELS
        for precision, speeds in SPEEDS.items()
    }
    return {
        "command": "bench",
        "fastres": "0.1.0",
        "schema": 1,
        "machine": MACHINE,
        "run": dict(RUN),
        "models": MODELS,
        "backends": dict.fromkeys(lanes, "cpu"),
        "left_out": {"torch_compile": "no compiler is installed"},
        "lanes": lanes,
        "baseline": f"{MODELS[0]} fp32 eager",
        "seed": 7,
        "measurements": measurements,
        "ratios": [
            _ratio(ours, m) for m in measurements for ours in lanes if m["target"] in lanes[ours]
        ],
        "parity": [_parity(m) for m in measurements],
        "profiles": [_profile(draw, "fp32"), _profile(draw, "int8")],
        "rates": {
            "fp32": {"gflop_per_s": 210.0, "gb_per_s": 18.0},
            "int8": {"gflop_per_s": 840.0, "gb_per_s": 18.0},
        },
        "versions": [
            _versions(precision, size) for precision in ("fp32", "int8") for size in (1, 8)
        ],
        "comparison": {
            "base": "last week",
            "limit": 0.03,
            "notes": ["since then: openvino 2026.3 is now 2026.4"],
            "rows": [
                {
                    "target": m["target"],
                    "model": m["model"],
                    "precision": m["precision"],
                    "batch_size": m["batch_size"],
                    "yardstick": f"{MODELS[0]} fp32 eager",
                    "change": {"median": 0.9 + 0.05 * i, "low": 0.88 + 0.05 * i, "high": 1.3},
                    "verdict": verdict,
                }
                for i, (m, verdict) in enumerate(
                    zip(
                        (m for m in measurements if m["target"] in lanes),
                        ("slower", "unclear", "same", "faster"),
                        strict=False,
                    )
                )
            ],
        },
    }


@pytest.fixture
def scaling_document() -> Document:
    def series(name: str, label: str, xs: list[float], fit: Document | None) -> Document:
        points = [
            {"x": x, "median": 3 + 2 * x, "low": 2.7 + 2 * x, "high": 3.4 + 2 * x} for x in xs
        ]
        return {
            "name": name,
            "target": "fastres cpu",
            "x_label": label,
            "unit": "ms",
            "points": points,
            "fit": fit,
        }

    straight = {"slope": 2.0, "intercept": 3.0, "r2": 0.998, "worst": 0.034}
    return {
        "command": "scaling",
        "fastres": "0.1.0",
        "schema": 1,
        "machine": MACHINE,
        "run": {**RUN, "seed": 0},
        "series": [
            series("batch", "images in a batch", [1, 2, 4, 8, 16], straight),
            series("image size", "pixels, thousands", [12, 25, 50, 100], straight),
            series("threads", "threads", [1, 2], None),
        ],
    }


@pytest.fixture
def accuracy_document() -> Document:
    def engine(name: str, change: float) -> Document:
        gap = {"value": change, "low": change - 0.001, "high": change + 0.001}
        found = {
            "predictions": 1000,
            "top1": 0.95 + change,
            "difference": gap,
            "agreement": 0.99,
            "lost": 3,
            "won": 2,
            "other": 1,
        }
        return {"name": name, "parts": {"clean": found, "all": found}, "versions": {}}

    engines = {"fp32": 0.0, "bf16": 0.0002, "int8 minmax": -0.0012, "int8 auto": -0.0005}
    rows = [engine(*pair) for pair in engines.items()]
    trial = {"network": "resnet20", "backend": "cpu", "pictures": 1797, "rows": rows}
    return {
        "machine": MACHINE,
        "settings": {"seed": 0},
        "sections": [{**trial, "notes": ["auto took mse"]}],
        "notes": [],
    }


@pytest.fixture
def guard_document() -> Document:
    """Of the first of three trials not all is known, and the guard is not sure of it."""

    def trial(same: float | None, slowed: float, verdicts: tuple[str, str], agree: bool) -> Any:
        return {
            "same": {"median": same, "low": 0.97, "high": 1.03},
            "same_verdict": verdicts[0],
            "slowed": {"median": slowed, "low": slowed - 0.02, "high": slowed + 0.02},
            "slowed_verdict": verdicts[1],
            "agree": agree,
            "seconds": 17.4,
        }

    return {
        "command": "guard_trials",
        "machine": MACHINE,
        "run": RUN,
        "limit": 0.05,
        "model": "cifar_resnet:62",
        "slower": "cifar_resnet:68",
        "trials": [
            trial(None, 0.94, ("unclear", "unclear"), False),
            trial(1.01, 0.91, ("same", "slower"), True),
            trial(0.99, 0.90, ("same", "slower"), True),
        ],
    }


@pytest.fixture
def documents(
    bench_document: Document,
    scaling_document: Document,
    accuracy_document: Document,
    guard_document: Document,
) -> list[Document]:
    """One of each kind; that of parity is the one in the repository."""
    parity = json.loads((RESULTS / "parity.json").read_text())
    return [bench_document, scaling_document, accuracy_document, parity, guard_document]


@pytest.fixture
def results() -> Path:
    """The documents of the repository, some of which are older than the schema."""
    return RESULTS


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Document], Path]:
    def save(document: Document, name: str = "results.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(document))
        return path

    return save


RESULTS = Path(__file__).parents[2] / "bench" / "results"


def _measurement(draw: random.Random, model: str, precision: str, size: int, name: str) -> Document:
    speed = SPEEDS[precision][name]
    median = 24.0 * size**0.9 / speed / (2.5 if precision == "int8" else 1)
    tail = draw.uniform(1.2, 1.9)
    quantiles = [median * (0.93 + 0.0014 * q + (tail - 1) * (q / 100) ** 24) for q in range(101)]
    target = f"{model} {precision} {name}"
    over = speed if target != f"{MODELS[0]} fp32 eager" else 1.0
    spread = 0.06 if over != 1.0 else 0.0
    return {
        "target": target,
        "model": model,
        "precision": precision,
        "batch_size": size,
        "throughput": 1e3 * size / median,
        "latency_ms": {f"p{q}": quantiles[q] for q in (50, 90, 95, 99)},
        "min_ms": quantiles[0],
        "samples": 321,
        "round_ms": [median] * 9,
        "launches": [3, 3, 3],
        "ran": f"{precision}, fp32" if name == "fastres" else "",
        "quantiles_ms": quantiles,
        "speedup": {"median": over, "low": over * (1 - spread), "high": over * (1 + spread)},
    }


def _ratio(ours: str, peer: Document) -> Document:
    """Ours is ahead of eager and onnxruntime, behind nncf, and as fast as openvino."""
    speeds = SPEEDS[peer["precision"]]
    ratio = speeds["fastres"] / speeds[peer["target"].rpartition(" ")[2]]
    kept = {key: peer[key] for key in ("model", "precision", "batch_size")}
    speed = {"median": ratio, "low": 0.95 * ratio, "high": 1.05 * ratio}
    return {"ours": ours, "peer": peer["target"], **kept, "speed": speed}


def _parity(measurement: Document) -> Document:
    kept = {key: measurement[key] for key in ("target", "model", "precision", "batch_size")}
    bounds = {"allowed_rms": 2e-6, "allowed_largest": 3e-5}
    return {**kept, "rms": 1.1e-7, "largest": 2.3e-6, **bounds}


def _profile(draw: random.Random, precision: str) -> Document:
    def work(name: str, flop: int, moved: int, op: str = "conv2d") -> Document:
        ms = max(flop / 1.6e8, moved / 9e6) * draw.uniform(0.8, 2.4)
        return {
            "name": name,
            "milliseconds": ms,
            "share": 0.05,
            "flop": flop,
            "bytes": moved,
            "op": op,
            "kernel": f"brgconv_avx512_{precision}",
            "precision": precision,
            "least": 0.0,
            "gflop_per_s": flop / ms / 1e6,
            "gb_per_s": moved / ms / 1e6,
            "roofline": 0.0,
        }

    rows = [
        work(f"layer{stage}.{i}.conv{j}", 210_000_000 >> (j % 2), 4_000_000 >> stage)
        for stage in (1, 2, 3, 4)
        for i in (0, 1)
        for j in (1, 2, 3)
    ]
    rows += [work("maxpool", 0, 4_000_000, "maxpool"), work("fc", 4_096_000, 8_200_000, "linear")]
    groups = [{**work(f"layer{stage}", 10**9, 10**7), "op": ""} for stage in (1, 2, 3, 4)]
    return {
        "target": f"{MODELS[0]} {precision} fastres",
        "model": MODELS[0],
        "precision": precision,
        "batch_size": 1,
        "backend": "cpu",
        "rows": rows,
        "groups": groups,
        "total": work("total", 8 * 10**9, 10**8),
    }


def _versions(precision: str, size: int) -> Document:
    stages = [
        {
            "group": f"layer{i}",
            "v1_ms": 4.0 + i,
            "v15_ms": 4.5 + i,
            "v1_macs": 9,
            "v15_macs": 10,
            "difference": {"median": 0.5, "low": 0.7 - 0.3 * i, "high": 0.8 + i},
        }
        for i in (1, 2, 3, 4)
    ]
    return {
        "net": "resnet50",
        "precision": precision,
        "batch_size": size,
        "v1_img_s": 48.0,
        "v15_img_s": 45.0,
        "ratio": {"median": 0.94, "low": 0.92, "high": 0.96},
        "macs_ratio": 1.063,
        "roofline_ratio": 1.06,
        "groups": stages,
    }


@dataclass
class Page(HTMLParser):
    """What a page is made of, by Python's own parser."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def attributes(self, *names: str) -> list[dict[str, str | None]]:
        return [given for tag, given in self.tags if tag in names]

    def check(self) -> None:
        """Well-formed, accessible, and nothing comes from anywhere else."""
        assert not self._open, f"never closed: {self._open}"
        assert self.attributes("html") == [{"lang": "en"}]
        levels = [int(tag[1]) for tag, _ in self.tags if tag in ("h1", "h2", "h3")]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
        ids = [given["id"] for _, given in self.tags if "id" in given]
        assert len(ids) == len(set(ids))
        kinds = [tag for tag, _ in self.tags]
        assert kinds.count("table") == kinds.count("caption") == kinds.count("thead")
        assert kinds.count("figure") == kinds.count("figcaption")
        assert all(given.get("scope") in ("col", "row") for given in self.attributes("th"))
        for given in self.attributes("svg"):
            assert given["role"] == "img" and len(given["aria-label"] or "") > 10
        for _, given in self.tags:
            links = [given.get(key) or "#" for key in ("href", "xlink:href")]
            assert all(link.startswith("#") and link[1:] in [*ids, ""] for link in links)
            assert "src" not in given and not any(key.startswith("on") for key in given)
        assert kinds.count("script") == 1 and kinds.count("style") == 1
        assert not {"link", "img", "iframe", "object"} & set(kinds)


@pytest.fixture
def parsed() -> Callable[[str], Page]:
    """The page's parts, once it has passed the checks of every page."""

    def parse(html: str) -> Page:
        assert not re.search(r"https?:|@import|url\((?!#)", html)
        page = Page()
        page.feed(html)
        page.close()
        page.check()
        return page

    return parse
