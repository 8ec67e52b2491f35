"""Device profiles: each loads, and holds plausible figures."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runlora_gen.cost import device as device_module
from runlora_gen.cost.device import device_for, device_names, device_of, load_device
from runlora_gen.cost.profile import parse_toml
from runlora_gen.request import files
from runlora_gen.request.errors import SpecError
from runlora_gen.request.workload import Workload

H100 = Path(device_module.__file__).parent / "devices" / "h100.toml"


@pytest.mark.parametrize("name", device_names())
def test_profile(name: str) -> None:
    device = load_device(name)
    assert device.title and device.source
    assert set(device.flops_per_s) - {"fp8"} == {"bf16", "fp16", "fp32"}
    assert "fp8" not in device.flops_per_s or device.flops_per_s["fp8"] > 1.5 * device.flops_per_s["bf16"]
    assert all(1e10 < rate < 1e16 for rate in device.flops_per_s.values())
    assert 1e9 < device.bytes_per_s < 1e14 and 0 < device.launch_s < 1e-3


def test_the_named_profiles_are_there() -> None:
    assert {"h100", "h200", "a100", "rtx-4090", "cpu"} <= set(device_names())


@pytest.mark.parametrize("name", ["h10", "", "../h100", "H100"])
def test_unknown_device(name: str) -> None:
    with pytest.raises(SpecError, match=r"^--device: .*known: .*h100"):
        load_device(name)


def data() -> dict[str, Any]:
    return {
        "format": 2,
        "title": "A machine",
        "source": "a test",
        "memory_gb_per_s": 1000,
        "launch_us": 1,
        "host_us": 10,
        "kernel_host_us": 20,
        "compiled_host_us": 5,
        "compiled_kernel_host_us": 4,
        "multiprocessors": 4,
        "tflops": {"bf16": 100, "fp16": 100, "fp32": 10},
        "times": {"bf16": {"TI,RI->TR scaled": "T  64 128\nR   8   8\n32 5.5   7\n"}},
        "tiles": {"bf16": {"x_at: TI,RI->TR scaled": {"constants": [{"BT": 128}], "best": "T 64 128\nR 8 8\n32 0 -"}}},
    }


def figures(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every number and text."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from figures(item, (*path, key))
    else:
        yield path


#: But those of the tables, which have a test of their own, and the number of the format.
FIGURES = [path for path in figures(data()) if path[-1] not in ("format", "best", "TI,RI->TR scaled")]


class TestLaunch:
    """What launches cost the host follows from the launch mode, and nothing else of the device does."""

    @pytest.mark.parametrize("name", device_names())
    def test_the_host_s_figures_are_those_of_the_mode(self, name: str) -> None:
        device = load_device(name)
        assert all(device_for(Workload(device=name, launch=launch)) is device for launch in ("eager", "graph"))
        compiled = device_for(Workload(device=name, launch="compile"))
        assert compiled is device_for(Workload(device=name, launch="compile", tokens=(1,)))
        assert compiled.host_s == device.compiled_host_s and compiled.kernel_host_s == device.compiled_kernel_host_s
        assert compiled.function_host_s == 0.0  # they are traced
        free = {"host_s": 0, "kernel_host_s": 0, "function_host_s": 0}
        assert replace(compiled, **free).__dict__ == replace(device, **free).__dict__
        assert compiled.kernels == device.kernels

    @pytest.mark.parametrize("name", ["a100", "rtx-4090"])
    def test_those_of_compile_are_an_h100_s_where_they_were_not_measured(self, name: str) -> None:
        """In the ratio of what operators cost both hosts, eagerly: as the files say."""
        h100, device = load_device("h100"), load_device(name)
        for mine, measured in (
            (device.compiled_host_s, h100.compiled_host_s),
            (device.compiled_kernel_host_s, h100.compiled_kernel_host_s),
        ):
            assert mine is not None and measured is not None
            assert mine == pytest.approx(measured * device.host_s / h100.host_s, abs=0.5e-6)

    def test_a_profile_without_them_is_refused(self, tmp_path: Path) -> None:
        lines = H100.read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / "old.toml").write_text("".join(line for line in lines if not line.startswith("compiled_")))
        old = Workload(device=str(tmp_path / "old.toml"))
        assert device_for(old).kernels and device_for(replace(old, launch="graph")).kernels
        with pytest.raises(SpecError) as caught:
            device_for(replace(old, launch="compile"))
        assert re.fullmatch(
            r"--launch: compile is not allowed with --device '\S+old\.toml', which has no compiled_host_us; give eager "
            r"or graph, or let `runlora-gen tune -o FILE\.toml` add it on that machine",
            str(caught.value),
        )


class TestDigest:
    """By its content a profile is known, as a file may change under its name."""

    def test_the_same_content_has_one(self) -> None:
        first, second = (device_of(name, data()) for name in ("a", "b.toml"))
        turned = device_of("a", dict(reversed(data().items())))
        assert first.digest == second.digest == turned.digest

    @pytest.mark.parametrize("path", FIGURES, ids=lambda path: "-".join(map(str, path)))
    def test_it_changes_with_every_figure(self, path: tuple) -> None:
        changed: Any = data()
        *above, last = path
        place = changed
        for key in above:
            place = place[key]
        place[last] = f"{place[last]}x" if isinstance(place[last], str) else place[last] * 2
        assert device_of("a", changed).digest != device_of("a", data()).digest

    @pytest.mark.parametrize("kind", ["times", "tiles"])
    def test_it_changes_with_every_word_of_a_table_and_not_with_how_columns_are_set(self, kind: str) -> None:
        def digest(change: Callable[[str], str]) -> str:
            changed: Any = data()
            ((key, table),) = changed[kind]["bf16"].items()
            if kind == "times":
                changed[kind]["bf16"][key] = change(table)
            else:
                table["best"] = change(table["best"])
            return device_of("a", changed).digest

        before = device_of("a", data()).digest
        assert digest(lambda table: table.replace(" ", "   ")) == before
        words = [("64", "63"), ("128", "127"), ("8\n", "9\n"), ("32", "31")]
        words += [("5.5", "5.4"), ("7", "-")] if kind == "times" else [("-", "0")]
        for old, new in words:
            assert digest(lambda table, old=old, new=new: table.replace(old, new, 1)) != before  # type: ignore[misc]

    def test_it_changes_with_what_another_profile_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def digest() -> str:
            return device_of("a", {**data(), "times": {}, "tiles": {}, "measured_on": "h200"}).digest

        before = digest()
        meter = replace(load_device("h200"), digest="other")
        monkeypatch.setattr(device_module, "load_device", lambda name: meter)
        assert digest() != before

    def test_no_two_of_the_package_have_the_same(self) -> None:
        digests = {load_device(name).digest for name in device_names()}
        assert len(digests) == len(device_names())


class TestFile:
    """What is given to --device is somebody's file."""

    def refused(self, path: Path) -> str:
        with pytest.raises(SpecError, match=r"^--device: '[^\n]*\.toml': [^\n]*$") as caught:
            load_device(str(path))
        return str(caught.value).partition(".toml': ")[2]

    def test_what_is_no_file(self, tmp_path: Path, odd: Callable[[Path], None]) -> None:
        odd(tmp_path / "x.toml")
        assert self.refused(tmp_path / "x.toml") == "not a regular file"

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match=r"^--device: there is no file '[^\n]*x.toml'$"):
            load_device(str(tmp_path / "x.toml"))

    @pytest.mark.parametrize("call", ["open", "stat"], ids=["file", "folder"])
    def test_without_permission(self, tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "x.toml").touch()

        def fail(*_: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", "x.toml")

        monkeypatch.setattr(files if call == "open" else os, call, fail, raising=False)
        assert self.refused(tmp_path / "x.toml") == "cannot be read: Permission denied"

    def test_size(self, tmp_path: Path) -> None:
        (tmp_path / "x.toml").write_text("#" * (4 << 20) + "\n")
        assert self.refused(tmp_path / "x.toml") == "larger than 4194304 bytes, which no profile is"

    @pytest.mark.parametrize(
        "text",
        [
            "a" + ".a" * 50_000 + " = 1",
            "[a" + ".a" * 50_000 + "]",
            "[[a" + " .\ta" * 50_000 + "]]",
            '"="' + ".a" * 50_000 + " = 1",
            "'=#'" + ".a" * 50_000 + " = 1",
            '"a"' + ".'a'" * 50_000 + " = 1",
            '"\\"' + '\\"' * 50_000 + '"' + ".a" * 50_000 + " = 1",
            "x = {a" + ".a" * 50_000 + " = 1}",
            'x = """\n\\""" #"""\ny' + ".a" * 50_000 + " = 1",
            "# don't\na" + ".a" * 50_000 + " = 1",
            'x = """""" # """\na' + ".a" * 50_000 + " = 1",
            "x = ''''a'''''\na" + ".a" * 50_000 + " = 1",
            "x = " + "[" * 50_000,
            "x = " + "{a = " * 50_000,
        ],
        ids=lambda text: ascii(text[:24]),
    )
    def test_what_takes_a_parser_long(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "x.toml").write_text(text)
        start = time.perf_counter()
        message = self.refused(tmp_path / "x.toml")
        assert time.perf_counter() - start < 5
        assert message in (
            "not a device profile: a key of more than four parts",
            "not a device profile: nested too deeply",
        )

    @pytest.mark.parametrize(
        "text",
        [
            "a" * 4_000_000,
            '"' * 4_000_000,
            '"""' + '\\"' * 1_000_000,
            "'" * 3_999_999,
            '"\\' * 1_000_000,
            "a. " * 1_000_000,
        ],
        ids=lambda text: ascii(text[:8]),
    )
    def test_what_would_take_a_search_long(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "x.toml").write_text(text)
        start = time.perf_counter()
        assert self.refused(tmp_path / "x.toml").startswith("not a device profile: ")
        assert time.perf_counter() - start < 10

    def test_dots_where_they_belong(self) -> None:
        text = """
            # a.b.c.d.e.f.g
            "a.b.c.d.e.f" = 'g.h.i.j.k.l' # a.b.c.d.e
            x.y.z = [1.5, 2.5, 3.5, 4.5, 5.5, 1979-05-27T07:32:00.999]
            long = \"""
            a.b.c.d.e.f.g "" = \"""
        """
        assert parse_toml(text.encode())["x"]["y"]["z"][:2] == [1.5, 2.5]
