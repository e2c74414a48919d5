"""Cells, the results file, resuming, and the choice of learning rates."""

import json

import pytest

from adalora.compare import running
from adalora.compare.cells import RESULTS, Results, cells_of_rate, dev_cells, groups, pick_rate, picked_cells
from adalora.compare.running import planned, run_suite
from adalora.compare.suite import Rate
from adalora.errors import DataError, OutOfMemory, TrainingError


def all_dev(suite):
    return [cell for group in groups(suite) for cell in dev_cells(suite, *group)]


def fake(cell, score, **changes):
    row = {"key": cell.key, "status": "ok", "metric": "accuracy", "score": score, "seconds": 2.0}
    return {**row, "task": cell.task, "method": cell.method, **changes}


def test_rate_is_picked_on_dev_by_the_mean_over_tuning_seeds(make_suite, tmp_path):
    suite = make_suite(learning_rates=[0.1, 0.01], tuning_seeds=[0, 7], methods=["lora"])
    group, results = groups(suite)[0], Results(tmp_path / RESULTS)
    scores = {(0.1, 0): 0.9, (0.1, 7): 0.1, (0.01, 0): 0.6, (0.01, 7): 0.6}
    for number, cell in enumerate(all_dev(suite)):
        assert cell.stage == "dev"
        assert pick_rate(suite, *group, results=results) is None, number
        results.add(fake(cell, scores[cell.rate.learning_rate, cell.seed]))
    assert pick_rate(suite, *group, results=results) == Rate(0.01)


def test_a_method_that_follows_takes_the_rate_of_another(make_suite, tmp_path):
    suite = make_suite(learning_rates=[0.1, 0.01], methods=["lora", {"name": "ours", "rate_of": "lora"}])
    results = Results(tmp_path / RESULTS)
    lora, ours = groups(suite)
    assert dev_cells(suite, *ours) == []
    assert pick_rate(suite, *ours, results=results) is None
    assert {cell.rate.learning_rate for cell, _, _ in planned(suite, results) if cell.method == "ours"} == {0.1}
    for cell in dev_cells(suite, *lora):
        results.add(fake(cell, 1 - cell.rate.learning_rate))
    assert pick_rate(suite, *ours, results=results) == pick_rate(suite, *lora, results=results) == Rate(0.01)


def test_lower_is_better_for_losses_and_diverged_rates_lose(make_suite, tmp_path):
    suite = make_suite(learning_rates=[0.1, 0.01, 1.0], methods=["lora"])
    results = Results(tmp_path / RESULTS)
    for cell in all_dev(suite):
        status = "diverged" if cell.rate.learning_rate == 1.0 else "ok"
        results.add(fake(cell, {0.1: 3.0, 0.01: 2.0, 1.0: 0.0}[cell.rate.learning_rate], metric="loss", status=status))
    assert pick_rate(suite, *groups(suite)[0], results=results) == Rate(0.01)


def test_a_rate_of_its_own_for_the_head_is_picked_beside_the_learning_rate(make_suite, recipe_file):
    tasks = [{"recipe": str(recipe_file), "name": "moods", "head_learning_rates": [None, 0.3]}]
    methods = ["lora", {"name": "ours", "rate_of": "lora"}]
    suite = make_suite(tasks=tasks, learning_rates=[0.1, 0.01], methods=methods)
    results = Results(suite.folder / RESULTS)
    lora, ours = groups(suite)
    cells = dev_cells(suite, *lora)
    assert [cell.rate for cell in cells] == [Rate(0.1), Rate(0.1, 0.3), Rate(0.01), Rate(0.01, 0.3)]
    assert len({cell.key for cell in cells} | {cell.folder for cell in cells}) == 8
    for cell in cells:
        assert cell.recipe["training"].get("head_learning_rate") == cell.rate.head
        results.add(fake(cell, 1.0 if cell.rate == Rate(0.01, 0.3) else 0.5))
    assert pick_rate(suite, *lora, results=results) == pick_rate(suite, *ours, results=results) == Rate(0.01, 0.3)
    (first, *_) = picked_cells(suite, *ours, results=results)
    assert "lr 0.01, head 0.3 seed 1" in first.label
    row = running.run_cell(first)
    assert (row["status"], row["learning_rate"], row["head_learning_rate"]) == ("ok", 0.01, 0.3)


def test_without_a_grid_the_head_s_rate_is_the_recipe_s(make_suite, recipe_file):
    tasks = [{"recipe": str(recipe_file), "name": "moods", "set": {"training.head_learning_rate": 0.3}}]
    suite = make_suite(tasks=tasks, methods=["lora"])
    same = make_suite(tasks=[tasks[0] | {"set": {}, "head_learning_rates": [0.3]}], methods=["lora"])
    assert suite.rates(suite.tasks[0], suite.methods[0]) == [Rate(0.01, 0.3)]
    keys = [
        [cell.key for cell in picked_cells(s, *groups(s)[0], results=Results(s.folder / "none"))] for s in (suite, same)
    ]
    assert keys[0] == keys[1]


def test_suite_runs_picks_and_does_not_run_again(make_suite, monkeypatch):
    suite = make_suite(learning_rates=[0.01, 1e-6], methods=["lora", "ours", "head"], steps=30)
    seen = []
    results = run_suite(suite, report=lambda cell, row: seen.append((cell, row)))
    assert [row["status"] for _, row in seen] == ["ok"] * 12, seen
    tests = [cell for cell, _ in seen if cell.stage == "test"]
    assert sorted((c.method, c.seed) for c in tests) == [(m, s) for m in ("head", "lora", "ours") for s in (1, 2)]
    assert {c.rate.learning_rate for c in tests if c.method != "head"} == {0.01}
    assert all(c.stage == "dev" or "test split" in results.rows[c.key]["rows"] for c, _ in seen)
    assert all("validation split" in row["rows"] for c, row in seen if c.stage == "dev")
    sizes = {row["method"]: row["parameters"] for _, row in seen}
    assert sizes["head"] == 0
    monkeypatch.setattr(running, "run_cell", lambda cell: pytest.fail("ran again"))
    again = run_suite(suite)
    assert again.rows.keys() == results.rows.keys()
    assert not (suite.folder / "work").exists() or not any((suite.folder / "work").iterdir())


def test_a_stopped_suite_continues(make_suite, monkeypatch):
    suite, ran = make_suite(methods=["lora"], seeds=[1, 2, 3]), []

    def stop_at_second(cell):
        if len(ran) == 1:
            raise KeyboardInterrupt
        ran.append(cell)
        return fake(cell, 0.5)

    monkeypatch.setattr(running, "run_cell", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        run_suite(suite)
    monkeypatch.setattr(running, "run_cell", lambda cell: ran.append(cell) or fake(cell, 0.5))
    run_suite(suite)
    assert [cell.seed for cell in ran] == [1, 2, 3]


def test_changed_settings_are_new_cells_and_new_names_are_not(make_suite, recipe_file):
    def keys(**changes):
        suite = make_suite(methods=["lora"], **changes)
        return [c.key for c in cells_of_rate(suite, suite.tasks[0], 2, suite.methods[0], rate=Rate(0.01))]

    base = keys()
    assert keys(steps=7) != base
    assert keys(alpha_per_rank=1.0) != base
    assert keys(output="elsewhere", tasks=[{"recipe": str(recipe_file), "name": "other"}]) == base


def test_another_metric_counts_in_what_has_been_run(make_suite, recipe_file, tmp_path):
    def of(metric):
        tasks = [{"recipe": str(recipe_file), "metric": metric}]
        suite = make_suite(methods=["lora"], learning_rates=[0.1, 0.01], tasks=tasks)
        return suite, (suite.tasks[0], 2, suite.methods[0])

    suite, group = of("accuracy")
    results = Results(tmp_path / RESULTS)
    for cell in [c for rate in (0.1, 0.01) for c in cells_of_rate(suite, *group, rate=Rate(rate))]:
        results.add(fake(cell, 0.9, dev_curve=[[1, 0.9]], scores={"accuracy": 0.9, "loss": 4.0}))
    for cell in dev_cells(suite, *group):
        first = cell.rate.learning_rate == 0.1
        results.add(fake(cell, 0.9 if first else 0.8, scores={"accuracy": 0.9, "loss": 2.0 if first else 1.0}))
    assert pick_rate(suite, *group, results=results) == Rate(0.1)

    suite, group = of("loss")
    assert pick_rate(suite, *group, results=results) == Rate(0.01)  # lower is better
    rows = results.of(picked_cells(suite, *group, results=results))
    assert {(row["metric"], row["score"], len(row["dev_curve"])) for row in rows} == {("loss", 4.0, 0)}

    suite, group = of("f7")
    with pytest.raises(DataError, match=r"tasks\.metric='f7': moods has accuracy, loss"):
        results.of(cells_of_rate(suite, *group, rate=Rate(0.1)))


def test_a_torn_last_line_is_left_out_and_closed(make_suite, tmp_path):
    suite = make_suite(methods=["lora"], seeds=[1, 2, 3])
    cells = cells_of_rate(suite, suite.tasks[0], 2, suite.methods[0], rate=Rate(0.01))
    path = tmp_path / RESULTS
    Results(path).add(fake(cells[0], 0.5))
    with path.open("a") as file:
        file.write('{"key": "torn')
    results = Results(path)
    assert [results.done(cell) for cell in cells] == [True, False, False]
    results.add(fake(cells[1], 0.5))
    assert [Results(path).done(cell) for cell in cells] == [True, True, False]
    path.write_text('{"other": 1}\n' + json.dumps(fake(cells[0], 0.5)) + "\n")
    with pytest.raises(DataError, match="not a result"):
        Results(path)


def test_what_a_method_cannot_do_is_recorded_and_not_tried_again(make_suite, recipe_file):
    few = [{"recipe": str(recipe_file), "name": "moods", "set": {"lora.target_modules": ["query"]}}]
    suite = make_suite(methods=["lora", "houlsby"], tasks=few, seeds=[1])
    results = run_suite(suite)
    statuses = {row["method"]: row for row in results.rows.values()}
    assert statuses["lora"]["status"] == "ok"
    assert statuses["houlsby"]["status"] == "refused"
    assert "the budget is" in statuses["houlsby"]["error"]
    assert all(done for _, done, _ in planned(suite, results))


@pytest.mark.parametrize(("error", "status"), [(OutOfMemory("lower"), "failed"), (TrainingError("NaN"), "diverged")])
def test_exhausted_memory_is_not_the_methods_fault(make_suite, monkeypatch, error, status):
    """A run that had no room is made again at the next start; one that diverged is a result."""
    monkeypatch.setattr(running, "_train", lambda cell: (_ for _ in ()).throw(error))
    row = running.run_cell(all_dev(make_suite(learning_rates=[0.1, 0.01]))[0])
    assert (row["status"], row["error"]) == (status, str(error))


def test_unknown_metric_is_named(make_suite, recipe_file):
    suite = make_suite(methods=["lora"], tasks=[{"recipe": str(recipe_file), "metric": "f7"}], seeds=[1])
    row = next(iter(run_suite(suite).rows.values()))
    assert row["status"] == "refused"
    assert "f7" in row["error"]


def test_plan_says_what_is_left_and_how_long(make_suite, tmp_path):
    suite = make_suite(learning_rates=[0.1, 0.01], methods=["lora"])
    results = Results(tmp_path / RESULTS)
    plan = planned(suite, results)
    assert [(c.stage, done, seconds) for c, done, seconds in plan] == [
        ("dev", False, None), ("dev", False, None), ("test", False, None), ("test", False, None),
    ]  # fmt: skip
    results.add(fake(plan[0][0], 0.5))
    plan = planned(suite, results)
    assert [done for _, done, _ in plan] == [True, False, False, False]
    assert plan[1][2] == 2.0


def test_two_processes_give_the_same_scores_as_one(make_suite, tmp_path):
    one = run_suite(make_suite(methods=["lora"], output=str(tmp_path / "one"), steps=20))
    two = run_suite(make_suite(methods=["lora"], output=str(tmp_path / "two"), steps=20), processes=2)
    assert {k: r["score"] for k, r in one.rows.items()} == {k: r["score"] for k, r in two.rows.items()}
    assert {r["status"] for r in two.rows.values()} == {"ok"}
