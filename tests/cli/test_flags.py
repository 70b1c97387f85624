"""What the shared flags mean, without running a command."""

import inspect
from dataclasses import fields
from pathlib import Path

import pytest

from fastres.cli.flags import Json, Request, batch_sizes, numbers, takes_request
from fastres.errors import InputError


@pytest.mark.parametrize(
    ("text", "sizes"),
    [(None, (4,)), ("1", (1,)), ("1,8", (1, 8)), ("8, 1", (8, 1)), ("2,2,1", (2, 1))],
)
def test_batch_sizes_are_read_in_order(text: str | None, sizes: tuple[int, ...]) -> None:
    assert batch_sizes(text, (4,)) == sizes


@pytest.mark.parametrize("text", ["", "0", "0,x", "1,x", "-1", "1.5", "1,,2", "²"])
def test_a_bad_batch_list_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not an integer of at least 1"):
        batch_sizes(text, (1,))


def test_numbers_come_in_the_count_asked_for() -> None:
    assert numbers("--mean", "0.5,0,-1e-3", 3) == (0.5, 0.0, -0.001)
    for text in ("0.5", "1,2,3,4", "a,b,c", ""):
        with pytest.raises(InputError, match="--mean"):
            numbers("--mean", text, 3)


def test_a_request_names_the_flags_that_no_saved_engine_takes() -> None:
    assert Request(model="e.fastres", device="cpu", image_size=32).only_for_models() == []
    request = Request(precision="bf16", on_unsupported="fallback", threads=2)
    assert request.only_for_models() == ["--precision", "--threads", "--on-unsupported"]
    assert Request(model="e.fastres", trust_engine=True).only_for_models() == []
    assert Request(weights=Path("w"), entry="e").only_for_models() == ["--weights", "--entry"]
    assert Request(tune=True, cache_dir=Path("t")).only_for_models() == ["--tune", "--cache-dir"]


def test_a_command_has_the_shared_flags_where_its_request_stands() -> None:
    seen = []

    @takes_request(without=("batch_size",))
    def command(first: str = "", *, request: Request, as_json: Json = False) -> None:
        seen.append((first, request, as_json))

    shared = [field.name for field in fields(Request)]
    shared = [n for n in shared if n not in ("batch_size", "model", "batch_sizes", "target")]
    parameters = inspect.signature(command).parameters
    assert list(parameters) == ["first", *shared, "as_json"]
    command(**{name: p.default for name, p in parameters.items()} | {"threads": 2})
    assert seen == [("", Request(threads=2), False)]


def test_only_commands_that_run_nothing_build_for_other_machines() -> None:
    @takes_request(target=True)
    def command(*, request: Request) -> None:
        pass

    assert "target" in inspect.signature(command).parameters
