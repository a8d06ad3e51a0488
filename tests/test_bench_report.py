"""What is made of benchmark results: the report, the CSV, the comparison of runs, exponents and instruction counts."""

from __future__ import annotations

import csv
import json
import math
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench import comparison, growth, instructions, reading, report, roofline, table
from bench.measure import Comparison

KEPT_RUNS = sorted(path for path in instructions.KEPT.parent.glob("*.json") if path != instructions.KEPT)


def timing(median: float, spread: float = 0.02, run_medians: tuple[float, ...] = ()) -> dict[str, Any]:
    return {
        "median": median,
        "lower_quartile": median * (1 - spread),
        "upper_quartile": median * (1 + spread),
        "rounds": 20,
        "run_medians": list(run_medians),
    }


def entry(op: str, label: str, stage: str, timings: dict[str, dict[str, Any]], **fields: Any) -> dict[str, Any]:
    empty: dict[str, Any] = dict.fromkeys(("bytes", "operations", "sweep", "position", "model"))
    return {"op": op, "label": label, "stage": stage, "timings": timings, **empty} | {
        "failures": {},
        "skipped": {},
        "peak_bytes": {},
        **fields,
    }


def results() -> dict[str, Any]:
    """A file in the format of today, with everything that can be in one."""
    main = {"copy": timing(1e-4), "eager": timing(5e-3), "compile": timing(1e-3), "fused": timing(2e-4)}
    return {
        "date": "2026-11-21T12:00:00+00:00",
        "machine": {"processor": "A <fast> processor & more", "threads": 2, "cpu_module": {"instruction_set": "avx2"}},
        "versions": {"chainzrule_kernels": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "commit": "abc"},
        "quick": False,
        "bounds": [
            {
                "what": "ours <b>",
                "limit": 2,
                "sense": "at least",
                "unit": "x",
                "measured": 1.5,
                "met": False,
                "reason": "r & s",
            },
            {"what": "kept", "limit": 2, "sense": "at most", "unit": "us", "measured": 1.5, "met": True, "reason": ""},
            {
                "what": "unknown",
                "limit": 2,
                "sense": "at most",
                "unit": "x",
                "measured": None,
                "met": None,
                "reason": "",
            },
        ],
        "comparisons": [
            entry("polynomial", "main 64x64 float32", "forward", main, bytes=1 << 20, model="a model <i>"),
            entry(
                "polynomial",
                "main 64x64 float32",
                "both",
                {**main, "another library": timing(4e-4)},
                bytes=1 << 21,
                failures={"compile": "result 0 is <script>alert(1)</script>"},
                skipped={"liger": "liger-kernel is not installed"},
                peak_bytes={"eager": 4 << 20, "fused": 1 << 20},
            ),
            *(
                entry(
                    "polynomial",
                    f"batch sweep {rows}x64 float32",
                    "both",
                    {"copy": timing(1e-8 * rows), "fused": timing(3e-8 * rows)},
                    bytes=rows * 640,
                    sweep="batch",
                    position=rows,
                )
                for rows in (64, 256, 1024)
            ),
            entry(
                "linear",
                "1",
                "forward",
                {"F.linear": timing(1e-3), "fused": timing(1.01e-3)},
                operations=10**8,
                bytes=10**6,
            ),
            entry("conv", "one", "forward", {}, failures={"fused": "it is wrong"}),
            entry("step", "two", "memory", {}, peak_bytes={"eager": 10, "fused": 0}),
        ],
        "errors": {"bench_x.py::test_y": "RuntimeError: <out of luck>"},
    }


def scaled(content: dict[str, Any], factors: dict[str, float]) -> dict[str, Any]:
    """The same results with the times of some providers multiplied."""
    other = json.loads(json.dumps(content))
    for one in other["comparisons"]:
        for provider, values in one["timings"].items():
            for name in ("median", "lower_quartile", "upper_quartile"):
                values[name] *= factors.get(provider, 1.0)
            values["run_medians"] = [value * factors.get(provider, 1.0) for value in values.get("run_medians", ())]
    return other


class Page(HTMLParser):
    """Collects text and addresses, and checks that elements are closed in order."""

    VOID = ("meta", "br", "link", "img", "path", "use")

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.names: list[str] = []
        self.text = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self._collect(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._collect(attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def _collect(self, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        self.names += [value or "" for name, value in attrs if name == "id"]


# ---- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of :func:`results`, from a folder that was not there."""
    return report.write(results(), tmp_path_factory.mktemp("report") / "new" / "folder").read_text(encoding="utf-8")


def test_report_holds_everything_and_asks_for_nothing(content: str) -> None:
    page = Page(content)
    assert page.open == []
    assert len(page.names) == len(set(page.names))
    assert all(address.startswith("#") and address[1:] in page.names for address in page.addresses)
    assert "<script" not in content
    # What a template prints of an object that it was not meant for.
    assert "object at 0x" not in page.text
    assert "@import" not in content
    for said in (
        "A <fast> processor & more",
        "ours <b>",
        "r & s",
        "a model <i>",
        "<script>alert(1)</script>",
        "liger-kernel is not installed",
        "it is wrong",
        "RuntimeError: <out of luck>",
        "predicted slope",
        "Bandwidth by size.",
        "Roofline.",
    ):
        assert said in page.text, said


def test_report_says_where_ours_stands(content: str) -> None:
    text = Page(content).text
    assert "25× faster" in text  # eager
    assert "2× faster (another library)" in text
    assert "2× copy" in text
    assert "0.25× eager" in text  # peak memory
    # The middle halves of the rounds of F.linear and of ours overlap, and the product is the floor.
    assert "1.01× F.linear" in text
    assert [mark in text for mark in ("✗ missed", "✓ met", "– not measured")] == [True] * 3


def test_a_peer_at_other_arguments_of_an_op_is_shown_with_them() -> None:
    run = results()
    both = next(one for one in run["comparisons"] if one["op"] == "polynomial" and one["stage"] == "both")
    peer = {"torchortho": timing(6e-4), "fused": timing(2e-4)}
    del both["timings"]["another library"]
    run["comparisons"].append(entry("polynomial", "main 64x64 float32, Hermite", "both", peer))
    assert "3× faster (torchortho) at main 64x64 float32, Hermite" in Page(report.render(run)).text


def test_a_sweep_without_a_copy_has_a_dash() -> None:
    points = [entry("step", f"depth {d}", "both", {"fused": timing(d)}, sweep="depth", position=d) for d in (1, 2, 4)]
    assert "object at 0x" not in Page(report.render({**results(), "comparisons": points})).text


def test_tiny_sizes_keep_no_promise_and_break_none() -> None:
    text = Page(report.render({**results(), "quick": True})).text
    assert "A quick run" in text
    assert not any(mark in text for mark in ("✗ missed", "✓ met"))


def test_pictures_are_well_formed_and_follow_the_theme(content: str) -> None:
    pictures = [part.split("</svg>")[0] + "</svg>" for part in content.split("<svg")[1:]]
    assert len(pictures) == 3
    for picture in pictures:
        root = ElementTree.fromstring("<svg" + picture)
        assert "viewBox" in root.attrib
        assert "var(--ours)" in picture
        assert "#00000" not in picture


@pytest.mark.parametrize("path", KEPT_RUNS, ids=lambda path: path.name)
def test_report_of_every_kept_run(path: Path) -> None:
    content = json.loads(path.read_text())
    text = Page(report.render(content)).text
    for one in reading.read(content).comparisons:
        assert one.op in text
        assert one.label in text


def test_report_of_a_gpu_file() -> None:
    content = {
        "date": "2026-11-21T12:00:00+00:00",
        "machine": {"gpu": "A GPU", "driver": "1"},
        "versions": {"commit": "abc"},
        "bounds": [{"what": "a promise", "sense": ">=", "limit": 0.97, "measured": 0.98}],
        "peak_bytes": {"fused": 1, "eager": 4},
        "results": [
            {
                "work": "polynomial_dreg, shared, 65536x1024 bfloat16",
                "stage": "forward",
                "bytes": 1 << 28,
                "seconds": {"copy": [1e-4, 1.1e-4], "fused": [1.05e-4, 1.06e-4], "compile": []},
                "failures": {"compile": "no"},
            }
        ],
    }
    run = reading.read(content)
    assert run.on_gpu
    assert run.promises[0].met
    assert math.isclose(reading.rate(run.comparisons[0], "fused") or 0, (1 << 28) / 1.055e-4)
    text = Page(report.render(content)).text
    assert "A GPU" in text
    assert "python -m bench.gpu" not in text


@pytest.mark.parametrize("unreadable", [{}, {"machine": {}}, [], None])
def test_what_is_no_result_file_is_refused(unreadable: Any, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match="results: expected"):
        report.write(unreadable, tmp_path / "page")
    assert not (tmp_path / "page").exists()


# ---- the CSV ---------------------------------------------------------------------------------------------------------


def test_rows_grow_and_the_header_stays(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "measurements.csv"
    table.append(results(), path)
    table.append(results(), path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * sum(len(reading.providers(one)) for one in reading.read(results()).comparisons)
    assert not any(row["op"] == "op" for row in rows)
    by_provider = {row["provider"]: row for row in rows if row["label"].startswith("main") and row["stage"] == "both"}
    assert by_provider["compile"]["status"] == "failed"
    assert by_provider["compile"]["median_seconds"] == ""
    assert by_provider["liger"]["status"] == "skipped"
    ours = by_provider["fused"]
    assert (ours["status"], ours["commit"], ours["threads"]) == ("measured", "abc", "2")
    assert float(ours["gigabytes_per_second"]) == pytest.approx((1 << 21) / 2e-4 / 1e9)
    assert float(ours["part_of_copy"]) == pytest.approx(0.5)
    assert int(ours["peak_bytes"]) == 1 << 20


def test_a_file_with_other_columns_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("date,op,colour\n")
    with pytest.raises(ValueError, match=r"other columns.*colour"):
        table.append(results(), path)
    assert path.read_text() == "date,op,colour\n"


# ---- two runs --------------------------------------------------------------------------------------------------------


def verdicts(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {change.verdict for change in comparison.changes(before, after) if change.provider == "fused"}


def test_a_real_change_is_seen() -> None:
    before, after = results(), scaled(results(), {"fused": 1.5})
    assert verdicts(before, after) == {"slower"}
    assert comparison.is_slower(before, after)
    assert verdicts(after, before) == {"faster"}
    assert not comparison.is_slower(after, before)
    change = next(one for one in comparison.changes(before, after) if one.provider == "fused")
    assert change.low < 1.5 < change.high
    assert any("slower" in line for line in comparison.lines(before, after))


def test_tiny_sizes_are_not_called_slower() -> None:
    slower = {**scaled(results(), {"fused": 9.0}), "quick": True}
    assert not comparison.is_slower({**results(), "quick": True}, slower)
    assert not comparison.is_slower(results(), slower)
    del slower["comparisons"][1]["timings"]["fused"]
    slower["comparisons"][1]["failures"]["fused"] = "off by 3"
    assert comparison.is_slower(results(), slower)


def test_a_slower_machine_is_no_change() -> None:
    everyone = dict.fromkeys(("copy", "eager", "compile", "fused", "F.linear", "another library"), 1.5)
    assert verdicts(results(), scaled(results(), everyone)) == {"no change beyond noise"}


def test_the_rounds_spread_is_no_change() -> None:
    before = results()
    for one in before["comparisons"]:
        for provider in one["timings"]:
            one["timings"][provider] = timing(one["timings"][provider]["median"], spread=0.3)
    assert verdicts(before, scaled(before, {"fused": 1.25})) == {"no change beyond noise"}
    assert verdicts(before, scaled(before, {"fused": 2.5})) == {"slower"}


def test_drifting_yardsticks_are_no_change() -> None:
    before = results()
    after = scaled(before, {"copy": 1.4, "eager": 0.8, "F.linear": 0.75, "fused": 1.25})
    assert verdicts(before, after) == {"no change beyond noise"}


def test_repeated_runs_say_more_than_quartiles() -> None:
    wide = {"copy": timing(1e-4), "eager": timing(1e-3), "F.gelu": timing(1e-3)}
    before, after = (
        {**results(), "comparisons": [entry("op", "one", "both", {**wide, "fused": timing(median, 0.3, runs)})]}
        for median, runs in ((1e-3, (0.99e-3, 1e-3, 1.01e-3)), (1.2e-3, (1.19e-3, 1.2e-3, 1.21e-3)))
    )
    assert verdicts(before, after) == {"slower"}
    for content in (before, after):
        content["comparisons"][0]["timings"]["fused"]["run_medians"] = []
    assert verdicts(before, after) == {"no change beyond noise"}


def test_an_answer_that_is_wrong_now_counts_as_slower() -> None:
    after = results()
    one = after["comparisons"][1]
    del one["timings"]["fused"]
    one["failures"]["fused"] = "off by 3"
    assert comparison.is_slower(results(), after)
    assert any("FAILED now, no figure: off by 3" in line for line in comparison.lines(results(), after))


def test_other_circumstances_are_said() -> None:
    after = results()
    after["machine"] = {"processor": "another", "threads": 4, "cpu_module": {"instruction_set": "avx512"}}
    after["versions"] = {**after["versions"], "torch": "2.14.0", "commit": "def-dirty"}
    after["quick"] = True
    warnings = [line for line in comparison.lines(results(), after) if line.startswith("WARNING")]
    for word in ("machines", "threads", "torch", "modules", "quick", "changes"):
        assert any(word in warning for warning in warnings), word
    assert not any(line.startswith("WARNING") for line in comparison.lines(results(), results()))


def test_more_memory_is_said() -> None:
    after = results()
    after["comparisons"][1]["peak_bytes"]["fused"] *= 2
    assert any("more memory" in line for line in comparison.lines(results(), after))
    assert not any("memory" in line.split("verdict")[-1] for line in comparison.lines(results(), results()))


# ---- growth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_a_power_law_has_its_exponent_and_no_error(exponent: float) -> None:
    positions = [1.0, 2.0, 5.0, 8.0]
    fitted, error = growth.fit(positions, [3e-6 * position**exponent for position in positions])
    assert fitted == pytest.approx(exponent, abs=1e-12)
    assert error == pytest.approx(0, abs=1e-12)


def test_the_error_of_an_exponent_is_that_of_a_straight_line() -> None:
    import numpy

    x, y = numpy.array([1.0, 2.0, 4.0, 8.0, 16.0]), numpy.array([1.1, 1.9, 4.3, 7.7, 16.5])
    (slope, _), covariance = numpy.polyfit(numpy.log(x), numpy.log(y), 1, cov=True)
    fitted, error = growth.fit(list(x), list(y))
    assert fitted == pytest.approx(slope)
    assert error == pytest.approx(math.sqrt(covariance[0, 0]))


@pytest.mark.parametrize(("positions", "values"), [([1.0], [1.0]), ([2.0, 2.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 1.0])])
def test_what_has_no_exponent_is_refused(positions: list[float], values: list[float]) -> None:
    with pytest.raises(ValueError, match="positions"):
        growth.fit(positions, values)


def test_sweeps_are_found_and_what_is_predicted_follows_the_work() -> None:
    tangents = [
        entry(
            "op", f"{t}", "both", {"fused": timing(1e-6 * (1 + t))}, bytes=100 * (1 + t), sweep="tangents", position=t
        )
        for t in (1, 2, 4, 8)
    ]
    depth = [entry("step", f"{d}", "both", {"fused": timing(d)}, sweep="depth", position=d) for d in (1, 2, 4)]
    found = {one.op: one for one in growth.fits({"comparisons": [*tangents, *reversed(depth)]})}
    assert found["op"].exponent == pytest.approx(found["op"].predicted)
    assert found["op"].predicted is not None
    assert 0.6 < found["op"].predicted < 0.9
    assert (found["step"].positions, found["step"].predicted) == ((1.0, 2.0, 4.0), 1.0)
    assert found["step"].exponent == pytest.approx(1)
    assert len(list(growth.lines({"comparisons": tangents}))) == 2


def test_a_copy_is_predicted_by_its_bytes() -> None:
    points = [
        entry(
            "conv",
            f"{channels}",
            "forward",
            {"copy": timing(1e-6 * channels), "fused": timing(1e-6 * channels**2)},
            bytes=100 * channels,
            operations=10 * channels**2,
            sweep="channels",
            position=channels,
        )
        for channels in (4, 8, 16)
    ]
    predicted = {one.provider: one.predicted for one in growth.fits({"comparisons": points})}
    assert predicted == pytest.approx({"copy": 1, "fused": 2})


def test_series_of_one_kind_stay_apart() -> None:
    points = [
        entry("op", f"{kind} {rows}x64", "both", {"fused": timing(rows**power)}, sweep="batch", position=rows)
        for kind, power in (("narrow", 1.0), ("wide", 2.0))
        for rows in (2, 4, 8)
    ]
    exponents = [one.exponent for one in growth.fits({"comparisons": points})]
    assert exponents == pytest.approx([1, 2])


# ---- arithmetic and instructions -------------------------------------------------------------------------------------


def test_a_cubic_costs_a_dozen_operations() -> None:
    both = Comparison("polynomial_dreg", "main 8x8 float32", "forward", bytes=512)
    assert roofline.operations_per_element("polynomial_dreg", 3, "forward") == 13
    assert roofline.intensity(both) == 13 / 8
    halved = Comparison("polynomial_dreg", "main 8x8 bfloat16", "forward", bytes=256)
    assert roofline.intensity(halved) == 13 / 4
    assert roofline.intensity(Comparison("activation_dreg", "main 8x8 float32", "forward", bytes=512)) is None
    assert roofline.intensity(Comparison("linear", "one", "forward", bytes=512, operations=1024)) == 2


@pytest.fixture(scope="module")
def counted() -> instructions.Counts:
    try:
        counts, compiler = instructions.count()
    except instructions.UnavailableError as unavailable:
        pytest.skip(f"no instructions are counted: {unavailable}")
    kept = instructions.kept()["compiler"]
    if not instructions.same_family(compiler, kept):
        pytest.skip(f"the kept counts are those of {kept}, and the kernels here were compiled by {compiler}")
    return counts


def test_no_kernel_takes_many_more_instructions_than_it_did(counted: instructions.Counts) -> None:
    kept = instructions.kept()
    assert counted.keys() == kept["instructions_per_element"].keys(), "python -m bench.instructions --update"
    grown = [
        f"{kernel}, {stage}: {now:.2f} instructions per element, {before} with {kept['compiler']} on {kept['date']}"
        for kernel, stage, now, before in instructions.changes(counted, kept["instructions_per_element"])
        if before is None or now > instructions.BOUND * before
    ]
    assert not grown, "\n".join(grown)


def test_counts_follow_the_arithmetic(counted: instructions.Counts) -> None:
    for stage in ("forward", "backward"):
        by_degree = [counted[f"polynomial_dreg, degree {degree}, per channel"][stage] for degree in range(1, 9)]
        assert by_degree == sorted(by_degree)
        by_tangents = [counted[f"polynomial_tangent, degree 3, per channel, tangents {t}"][stage] for t in (1, 2, 4, 8)]
        steps = [by_tangents[1] - by_tangents[0], by_tangents[2] - by_tangents[1], by_tangents[3] - by_tangents[2]]
        # Each tangent costs the same.
        assert steps == pytest.approx([steps[0], 2 * steps[0], 4 * steps[0]], rel=0.05)
    # Eight lanes: a kernel that lost its vectors would take tens of instructions for each element of a cubic.
    assert counted["polynomial_dreg, degree 3, per channel"]["forward"] < 10


def test_a_promise_that_is_just_missed_shows_it() -> None:
    def shown(measured: float) -> str:
        return reading.Promise("what", 1.05, False, "x", measured, "").measured_in_words

    assert shown(1.0526) == "1.053"
    assert shown(1.05000001) == "1.05000001"
    assert shown(1.05) == "1.05"
    assert shown(0.97312) == "0.973"
