"""Figures of README and pages are those of the committed measurements."""

import json
import re
from importlib.metadata import version

import pytest

from adalora.compare.files import load_suite
from adalora.compare.statistics import interval, share_interval
from adalora.compare.summary import summarize
from adalora.config import initial_rank
from benchmarks.publish import FIGURES, published, rendered, svg
from helpers.docs_blocks import ROOT

RESULTS = ROOT / "benchmarks" / "results"
OVERHEAD = json.loads((RESULTS / "overhead.json").read_text(encoding="utf-8"))
MEANS = json.loads((RESULTS / "means.json").read_text(encoding="utf-8"))
COUNTS = OVERHEAD["counts"]
MASKS = ("ordinary", "mask")  # kinds of steps while the budget shrinks
MATPLOTLIB = re.search(r"^matplotlib==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]
GENERATED = re.compile(r"^<!-- (\S+) -->\n\n(.*?)\n\n<!-- end of \1 -->$", re.MULTILINE | re.DOTALL)


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def flowing(name):
    """A page with its line breaks as blanks."""
    return " ".join(page(name).split())


def parts():
    return dict(GENERATED.findall(page("docs/results.md")))


def of_the_file(name):
    """A published suite and its rows."""
    own = ROOT / "benchmarks" / f"{name}.yaml"
    return published(load_suite(own if own.is_file() else name), RESULTS / f"{name}.jsonl")


@pytest.fixture
def fields_not_checked(monkeypatch):
    """They were in the run, and would be here once a cell."""
    monkeypatch.setattr("adalora.tasks.recipe.fields.check_lora_fields", dict)


@pytest.mark.parametrize("name", parts())
def test_the_tables_of_a_suite_are_its_rows(name, fields_not_checked):
    text, drawn = rendered(*of_the_file(name))
    assert text == parts()[name]
    if version("matplotlib") == MATPLOTLIB:  # another one writes other text
        for file, figure in drawn.items():
            assert svg(figure, file) == (FIGURES / file).read_text(encoding="utf-8")


def test_every_figure_is_on_the_page():
    assert set(re.findall(r"\(figures/([^)]+)\)", page("docs/results.md"))) == {path.name for path in FIGURES.iterdir()}


def test_every_suite_s_rows_are_on_the_page():
    others = {"unfinished", "recipes", "orthogonality-forms", "head-rates"}  # told elsewhere, or not yet
    assert {path.stem for path in RESULTS.glob("*.jsonl")} - others == set(parts())


@pytest.mark.parametrize("suite", ["small", "heads"])
def test_readme_repeats_the_tables_of_two_tasks(suite):
    rows = re.findall(
        r"^\| (lora|ours) \| [\d,]+ \| [^|]+ \| ([\d.]+) ± [\d.]+ \| (.*?) \|", parts()[suite], re.MULTILINE
    )
    text = flowing("README.md")
    for (_, lora, _), (_, ours, told) in zip(rows[::2], rows[1::2], strict=True):
        difference, low, high = (float(number) for number in re.findall(r"[+-][\d.]+", told))
        assert re.search(rf"{float(ours):.3f} against {float(lora):.3f}", text)
        assert re.search(rf"\({difference:+.3f}, [^)]*{low:.3f} to {high:.3f}".replace("+", r"\+"), text)
    assert len(rows) == 4


def scores(suite):
    """Of a suite's first table, by method."""
    table = parts()[suite].split("\n### ")[1]
    rows = re.findall(r"^\| ([^|]+) \| [\d,]+ \| [^|]+ \| ([\d.]+) ± ", table, re.MULTILINE)
    return {method: float(score) for method, score in rows}


def test_choosing_a_budget_tells_what_wider_starts_bring():
    text = flowing("docs/choosing-a-budget.md")
    one, two = ([scores(suite)[name] for name in ("start of 4r", "ours", "lora")] for suite in ("small", "heads"))
    assert "{:.3f} from 8, {:.3f} from 4, and {:.3f} for LoRA".format(*one) in text
    assert "have {:.3f}, {:.3f} and {:.3f}".format(*two) in text
    assert f"{one[0]:.3f} with `r` 4 × the target" in flowing("README.md")


def test_readme_repeats_the_table_of_tuned_methods():
    found = {name: score for name, score in scores("rivals").items() if "4r" not in name}
    names = ("full", "ours", "eva", "lora", "peft-adalora", "random")
    told = (
        "full fine-tuning {}, the default {}, EVA {}, LoRA {}, PEFT's AdaLoRA {} with more parameters, "
        "random allocation {}"
    )
    assert told.format(*(f"{found[name]:.3f}" for name in names)) in flowing("README.md")
    assert sorted(found, key=lambda name: -found[name])[:3] == ["full", "ours", "eva"]


def test_readme_repeats_the_mean_of_the_suite_core():
    mean, low, high, count = re.search(
        r"^\| ours \| \+([\d.]+) % \[\+([\d.]+), \+([\d.]+)\] \| (\d+) \|", parts()["core"], re.MULTILINE
    ).groups()
    better, level = (
        len(re.findall(f"^- ours against .*: {word} ", parts()["core"], re.M)) for word in ("better", "no")
    )
    told = f"comparisons +{float(mean):.1f} % of LoRA's score ({float(low):.1f} to {float(high):.1f})"
    assert f"better in {better} comparisons and never shown to be below; in the mean of {count} {told}" in flowing(
        "README.md"
    )
    assert f"{better} of {count} comparisons are better, {level} show no difference" in flowing("docs/results.md")
    assert better + level == int(count)
    assert "worse" not in parts()["core"]


def test_the_means_where_lora_is_trained_are_those_of_the_rows(fields_not_checked):
    suite, results = of_the_file("search")
    others = [task for task in suite.tasks if task.name not in ("banking77", "squad2-half")]
    found = summarize(suite.model_copy(update={"tasks": others}), results)
    means = {method: gain for method, (gain, _) in found.overall.items()}
    told = {method: f"{gain.mean:+.2f} % [{gain.low:+.2f}, {gain.high:+.2f}]" for method, gain in means.items()}
    page = flowing("docs/results.md")
    assert f"the mean of the other 8 is {told['ours']}" in page
    assert f"the mean of 8 comparisons is {told['ours']}, from 4r {told['start of 4r']}" in page
    gain = means["ours"]
    assert f"the mean is {gain.mean:+.2f} % ({gain.low:.2f} to {gain.high:.2f})" in flowing("README.md")
    wide = suite.model_copy(update={"tasks": others, "baseline": "start of 4r"})
    gain, _ = summarize(wide, results).overall["ours"]
    assert f"ahead of the other by {gain.mean:.2f} % [{gain.low:+.2f}, {gain.high:+.2f}]" in page
    lines = by_name(found)
    gain = interval([dev_gains(lines, *key[:2]) for key in lines if key[2] == "ours"])
    assert f"dev split {gain.mean:.2f} % [{gain.low:+.2f}, {gain.high:+.2f}]" in page


def by_name(summary):
    return {(line.task, line.budget, line.method): line for line in summary.lines}


def dev_gains(lines, task, budget):
    """By which the default's last dev scores are above those of a start of 4r, in % of LoRA's mean, seed by seed."""
    found = [lines[task, budget, method] for method in ("ours", "start of 4r", "lora")]
    mine, theirs, base = ([line.tests[seed]["dev_curve"][-1][1] for seed in sorted(line.tests)] for line in found)
    return [100 * found[0].better * (a - b) * len(base) / sum(base) for a, b in zip(mine, theirs)]


def test_how_many_runs_kept_pace_is_what_the_rows_say(fields_not_checked):
    found = summarize(*of_the_file("core"))
    page = flowing("docs/results.md")
    total = re.search(r"^\| ours \|.*\| (\d+ of \d+) \((\d+)% to (\d+)%\) \|$", parts()["core"], re.MULTILINE)
    assert "{} runs ({} to {} %)".format(*total.groups()) in page
    kept = dict.fromkeys(("banking77", "airline", "stsb", "banking77-mpnet", "e2e"), 0)
    for line in found.lines:
        if line.task in kept:
            kept[line.task] += line.kept_pace
    assert min(kept.values()) >= 5
    low = {task: [f"{100 * end:.0f}" for end in share_interval(kept[task], 10)] for task in ("banking77-mpnet", "e2e")}
    assert f"banking77 {kept['banking77']} of 10" in page
    assert f"airline {kept['airline']}, STS-B {kept['stsb']}, MPNet {kept['banking77-mpnet']} " in page
    assert "MPNet {} ({} to {} %)".format(kept["banking77-mpnet"], *low["banking77-mpnet"]) in page
    assert "E2E {} ({} to {} %)".format(kept["e2e"], *low["e2e"]) in page


def test_the_first_hundred_steps_are_told_as_the_rows_have_them(fields_not_checked):
    lines = by_name(summarize(*of_the_file("core")))

    def lead(task, budget, step):
        """Of the default in the dev score, over the seeds."""
        mine, theirs = (lines[task, budget, method] for method in ("ours", "lora"))
        at = [[dict(line.tests[seed]["dev_curve"])[step] for seed in sorted(line.tests)] for line in (mine, theirs)]
        return interval([[mine.better * (a - b) for a, b in zip(*at)]])

    found = {key[:2]: lead(*key[:2], 100) for key in lines if key[0] not in ("e2e", "squad2-half")}
    verdicts = {key: gain.verdict for key, gain in found.items()}
    ahead = {("banking77", 1), ("banking77", 3), ("airline", 3)}
    assert {key for key, verdict in verdicts.items() if verdict == "better"} == ahead
    assert list(verdicts.values()).count("no difference shown") == 5
    told = {key: f"{gain.mean:+.3f}" for key, gain in found.items()}
    page = flowing("docs/results.md")
    assert f"banking77 ({told['banking77', 1]} and {told['banking77', 3]}) and airline at rank 3" in page
    assert f"airline at rank 3 ({told['airline', 3]}), on the other five level" in page
    e2e = {step: lead("e2e", 2, step) for step in (90, 120)}
    assert [gain.verdict for gain in e2e.values()] == ["worse", "better"]
    assert f"behind at 90, by {-e2e[90].mean:.3f} nats, and ahead at the end, by {e2e[120].mean:.3f}" in page
    assert [lead("e2e", 1, step).verdict for step in (30, 60, 90, 120)] == ["no difference shown"] * 4
    assert f"MPNet at rank 4 is {-lead('banking77-mpnet', 4, 200).mean:.3f} behind at step 200" in page


def spread(found):
    """Median and quartiles as pages have them."""
    return f"{found['median']:.2f} ({found['q25']:.2f}–{found['q75']:.2f})"


def megabytes(count):
    return f"{count / 1e6:.1f} MB"


def headline():
    """The first table of the page on performance, from the measurement."""
    ours, lora = COUNTS["MiniLM"]["ours"], COUNTS["MiniLM"]["lora"]["step"]["total"]
    theirs = COUNTS["MiniLM"]["peft_adalora"]["step"]["total"]
    run, phases = OVERHEAD["whole_run"], {phase: found["ours"] for phase, found in OVERHEAD["phases"].items()}
    bytes_of = OVERHEAD["memory"]["dropout 0.0"]
    peak = {phase: megabytes(count) for phase, count in bytes_of["ours"].items()}
    total = {phase: found["total"] for phase, found in ours.items()}
    return [
        f"| PEFT LoRA r = 8 | {lora} | 1 | {megabytes(bytes_of['lora'])} |",
        f"| PEFT AdaLoRA 12 → 8, at most | {theirs} | {spread(run['peft_adalora'])} | "
        f"{megabytes(bytes_of['peft_adalora'])} |",
        f"| adalora, warm-up | {total['warmup']} | {spread(phases['warmup'])} | {peak['warmup']} |",
        f"| adalora, decrease, ordinary steps | {total['decrease']}* | {spread(phases['decrease'])} | "
        f"{peak['decrease']} |",
        f"| adalora, decrease, mask steps | {total['mask']} ({total['mask'] / lora:.2f} ×) | | |",
        f"| adalora, the step of the hand-over | {total['handover']} | | |",
        f"| adalora, the step that compacts | {total['compaction']} | | |",
        f"| adalora, final phase | {total['final']} | {spread(phases['final'])} | {peak['final']} |",
        f"| adalora, whole run | | {spread(run['ours'])} | {megabytes(max(bytes_of['ours'].values()))} |",
    ]


def test_the_headline_table_is_the_measurement():
    table = page("docs/performance.md").split("## Results\n\n")[1].split("\n\n")[0].splitlines()
    assert table[2:] == headline()


def test_readme_repeats_the_time_of_a_whole_run():
    run = OVERHEAD["whole_run"]
    assert f"A step takes {spread(run['ours'])} of the time" in flowing("README.md")
    assert f"PEFT's AdaLoRA takes {spread(run['peft_adalora'])}" in flowing("README.md")


def test_readme_repeats_the_times_on_a_gpu():
    shapes = json.loads((RESULTS / "cuda.json").read_text(encoding="utf-8"))["shapes"].values()
    runs = [shape[precision]["run"] for shape in shapes for precision in ("fp32", "bf16 autocast")]
    ours, theirs = ([run[method]["median"] for run in runs] for method in ("ours", "peft_adalora"))
    told = [f"{min(ratios):.2f} to {max(ratios):.2f}" for ratios in (ours, theirs)]
    assert f"On an H200 it is {told[0]}, and {told[1]}" in flowing("README.md")


def test_the_table_of_the_host_s_part_is_the_measurement():
    for name, title in (("dropout 0.0", "no dropout"), ("dropout 0.1", "dropout 0.1")):
        cells = [spread(OVERHEAD["host"][name][phase]) for phase in ("warmup", "decrease", "final")]
        assert f"| {title} | {' | '.join(cells)} |" in page("docs/performance.md")


def test_the_table_of_means_is_the_measurement():
    for name, plain in MEANS["layer"].items():
        cells = [f"{found['median'] / 1e3:.2f}" for found in (plain, MEANS["layer, dropout 0.1"][name])]
        title = "`addmm` into" + name.removeprefix("addmm into") if name.startswith("addmm") else name
        assert f"| {title} | {' | '.join(cells)} |" in page("docs/performance.md")


def own(shape):
    """Operations of the controller's own by kind of step."""
    return {kind: found["allocation"] for kind, found in shape.items()}


def sentences():
    """What the text of the page says, from the measurement."""
    dropout, svd = COUNTS["MiniLM, dropout 0.1"], COUNTS["MiniLM, svd"]["ours"]
    starts, bert, run = OVERHEAD["starts"], OVERHEAD["bert_base_run"], OVERHEAD["whole_run"]
    ranks, tokens = OVERHEAD["ranks"], OVERHEAD["tokens"]
    kinds = ("warmup", "decrease", "mask", "final")
    wide, narrow = (own(COUNTS["MiniLM"]["ours"]), own(COUNTS["Llama-1B"]["ours"]))
    real = COUNTS["Llama-1B, real widths on meta"]
    grown = {kind: [own(found)[kind] for found in COUNTS["growth"].values()] for kind in wide}
    d = {kind: dropout["ours"][kind]["total"] for kind in kinds}
    yield f"sum of all seconds it is {run['ours']['total']:.2f}, PEFT AdaLoRA {run['peft_adalora']['total']:.2f}"
    yield f"{d['warmup']} in warm-up, {d['decrease']} while the budget shrinks, {d['mask']} in mask steps"
    yield f"mask steps and {d['final']} in the final phase"
    yield f"LoRA's {dropout['lora']['step']['total']}."
    held, lora = OVERHEAD["memory"]["dropout 0.1"]["ours"], OVERHEAD["memory"]["dropout 0.1"]["lora"]
    yield f"memory is {held['final'] / lora:.2f} of LoRA's ({held['final'] / 1e6:.1f} against {megabytes(lora)}"
    yield f"{megabytes(held['decrease'])} while the budget shrinks), and"
    alone, lora = (OVERHEAD["memory"]["dropout 0.0"][name] for name in ("sensitivity", "lora"))
    yield f"{megabytes(alone)} while the budget shrinks, {alone / lora:.2f} of LoRA's"
    shares = [[100 * found["ms"][kind] / found["step_ms"] for found in OVERHEAD["modules"].values()] for kind in MASKS]
    yield "ordinary step is {:.1f}, {:.1f}, {:.1f} and {:.1f} % at 24, 72, 240 and 702 modules".format(*shares[0])
    yield "of a mask step {:.1f}, {:.1f}, {:.1f} and {:.1f} %".format(*shares[1])
    yield f"{svd['decrease']['total']} operations an ordinary step, {svd['final']['total']} in the final phase"
    yield f'is {spread(OVERHEAD["parametrizations"]["svd"])}, that of `"lora"` in the same minutes '
    yield f"minutes {spread(OVERHEAD['parametrizations']['lora'])}"
    yield f"{spread(bert['run']['ours'])} over the whole run and {bert['run']['ours']['total']:.2f} by the sum"
    yield f"{spread(bert['phases']['decrease'])} while the budget shrinks, {spread(bert['phases']['final'])} in the"
    yield f"PEFT AdaLoRA {spread(bert['run']['peft_adalora'])}"
    yield "{} from 8 to 2, {} from 16 to 4 and {} from 16 to 8".format(*map(spread, starts.values()))
    yield "by the sum of all seconds {:.2f}, {:.2f}, {:.2f}".format(*(found["total"] for found in starts.values()))
    yield f"{ranks['2']['median']:.2f} at 2, {ranks['8']['median']:.2f} at 8, {ranks['16']['median']:.2f} at 16"
    yield f"{spread(ranks['64'])} at 64"
    yield f"{spread(tokens['64'])} at 64 a step, {tokens['256']['median']:.2f} at 256"
    yield f"{tokens['1024']['median']:.2f} at 1024"
    yield "{:.2f} of LoRA's at 512 tokens a step, {:.3f} at 2048, {:.3f} at 8192".format(
        *(found["ratio"] for found in OVERHEAD["memory_by_tokens"].values())
    )
    for name, title in (("BERT-base", "BERT-base"), ("Llama-1B", "a Llama of 1B's depth, narrow,")):
        numbers = [COUNTS[name]["ours"][kind]["total"] for kind in kinds]
        yield f"{title} {COUNTS[name]['lora']['step']['total']} / {', '.join(map(str, numbers))}"
    yield f"LoRA {real['lora']['step']['total']}, PEFT AdaLoRA {real['peft_adalora']['step']['total']}, adalora "
    yield "adalora {} in warm-up, {} while the budget shrinks, {} in the final phase".format(
        *(real["ours"][kind]["total"] for kind in ("warmup", "decrease", "final"))
    )
    assert {wide["decrease"], *grown["decrease"]} == {109}
    yield f"109 in an ordinary step, {min(grown['mask'])} or {max(grown['mask'])} in a mask step"
    assert {wide["final"], narrow["final"], *grown["final"]} == {1}
    yield f"{wide['handover']} and {min(grown['compaction'])} to {max(grown['compaction'])}"
    yield f"{narrow['decrease']} and {narrow['mask']} for the narrow Llama's"
    yield f"{own(real['ours'])['decrease']} are counted on `meta`"
    yield f"with a λ of its own {own(svd)['decrease']}."
    alone, together = (MEANS["hand-over"][how]["median"] / 1e3 for how in ("one by one", "together"))
    yield f"takes {wide['handover']} operations, and {together:.1f} ms instead of {alone:.1f} module by module"
    yield f"compaction takes {wide['compaction']} operations"
    yield f"{svd['decrease']['forward_backward']} operations of forward and backward, where "
    yield f"where {COUNTS['MiniLM']['ours']['decrease']['forward_backward']} are "
    yield f"groups take {wide['warmup']} operations"
    for part in ("averages", "orthogonality"):
        for found in MEANS[part].values():
            yield f"{found['median'] / 1e3:.2f} ms and {found['operations']}"
    yield "takes {} operations where every module keeps a triplet, {} where the upper".format(
        *MEANS["skipped layers"].values()
    )


def test_sentences_on_performance_are_the_measurement():
    text = flowing("docs/performance.md")
    assert [sentence for sentence in sentences() if sentence not in text] == []


def test_parts_are_said_to_be_of_the_commits_that_they_are_of():
    told = {}
    for row in re.findall(
        r"^\| (`[\w.]+`.*) \| (\w+) \| (\d+) to (\d+) \|$",
        page("docs/performance.md"),
        re.M,
    ):
        names, commit, low, high = row
        told |= {name: (commit, int(low), int(high)) for name in re.findall(r"`([\w.]+)`", names)}
    measured = {name.removesuffix("_measured"): found for name, found in OVERHEAD.items() if name.endswith("_measured")}
    measured["means.json"] = MEANS["measured"]
    assert told.keys() == measured.keys()
    for name, (commit, low, high) in told.items():
        assert measured[name]["commit"] == commit
        assert low <= measured[name]["load"][0] < high + 1


def test_the_table_of_starting_ranks_is_what_the_code_computes():
    rows = re.findall(r"^\| `(?:target_rank|r)` \| (.+) \|$", page("docs/choosing-a-budget.md"), re.MULTILINE)
    targets, starts = ([int(number) for number in row.split(" | ")] for row in rows)
    assert starts == [initial_rank(target) for target in targets]
    assert [initial_rank(target) for target in (2, 8, 11, 16)] == [4, 16, 16, 24]  # README's
    assert "4 for a target of 2, 16 for 8 to 11, 24 for 16" in flowing("README.md")
