"""Each diagnostic: raised where its condition holds, silent where it does not."""

import copy
import re

import numpy as np
import pytest

from adalora.config import AdaLoraConfig
from adalora.errors import AdaLoraWarning, ConfigError, HistoryError
from adalora.report.agreement import rank_agreement
from adalora.report.diagnostics import (
    EXPLANATIONS,
    Diagnostics,
    diagnose,
    diagnose_seeds,
    findings_of,
)
from adalora.report.history import History
from adalora.report.live import diagnose_live
from adalora.report.thresholds import CODES, DiagnosticThresholds
from helpers.synthetic import BERT, importance_of, run


def codes(history, **limits):
    return [f["code"] for f in diagnose(history, DiagnosticThresholds(**limits))]


def one_takes_all():
    importance = np.full(36, 1e-3)
    importance[7] = 1e3
    return importance


def replay(finished, history):
    for record in finished:
        history.add(**record)


PROVOKED = {
    "unstable-scores": {"score_noise": 3.0},
    "budget-too-low": {"loss_after_masks": 3.0, "loss_end": 0.3, "target": 1},
    "ranks-unbalanced": {"importance": one_takes_all(), "target": 0.5},
    "orthogonality-not-reached": {"orthogonality": 0.6},
    "slow-start": {"update_ratio": 3e-6},
    "final-phase-too-short": {"final": 0.04},
    "no-gradient": {"dead_modules": (3, 9)},
}


def test_a_healthy_run_raises_nothing():
    for seed in range(5):
        assert codes(run(seed=seed)) == []
    assert codes(run(layers=24, steps=2000, interval=20, target=2)) == []


@pytest.mark.parametrize("code", PROVOKED)
def test_provoked(code):
    assert code in codes(run(**PROVOKED[code]))


@pytest.mark.parametrize("code", PROVOKED)
def test_ignored(code):
    assert code not in codes(run(**PROVOKED[code]), ignore=(code,))


def test_every_code_has_a_cause_and_a_cure_and_a_test():
    assert set(CODES) == set(EXPLANATIONS) == {*PROVOKED, "ranks-differ-between-seeds"}
    assert all(cause and cure for cause, cure in EXPLANATIONS.values())


def test_cures_name_settings_that_exist():
    cures = " ".join(cure for _, cure in EXPLANATIONS.values())
    named = set(re.findall(r"\b([a-z]+(?:_[a-z]+)+)\b|\b([a-z_]+)=", cures))
    settings = {a or b for a, b in named} - {"lora_alpha", "target_modules"}  # these two are LoraConfig's
    assert len(settings) >= 6
    assert settings <= set(AdaLoraConfig.model_fields)


@pytest.mark.parametrize(
    ("code", "strict", "loose"),
    [
        ("unstable-scores", {"revived_share": 0.001}, {"revived_share": 1.0}),
        ("budget-too-low", {"loss_rise": 0.01}, {"loss_rise": 50.0}),
        ("ranks-unbalanced", {"zero_share": 0.01}, {"zero_share": 1.0, "largest_share": 1.0}),
        ("orthogonality-not-reached", {"orthogonality": 0.001}, {"orthogonality": 1.0}),
        ("slow-start", {"update_ratio": 0.5}, {"update_ratio": 0.0}),
        ("final-phase-too-short", {"final_share": 0.9}, {"final_share": 0.0}),
    ],
)
def test_thresholds_decide(code, strict, loose):
    knobs = PROVOKED[code]
    assert code in codes(run(**knobs), **strict)
    assert code not in codes(run(**knobs), **loose)


def test_messages_name_the_numbers():
    history = run(final=0.04, dead_modules=(3,), orthogonality=0.6)
    found = {f["code"]: f["message"] for f in diagnose(history)}
    assert "16 of 400 steps (4.0%; wanted: 10%)" in found["final-phase-too-short"]
    assert "1 of 36 modules never got a gradient" in found["no-gradient"]
    assert "encoder.layer.0.attention.output.dense" in found["no-gradient"]
    assert f"cosine of {history.last('allocation')['orthogonality']:.2f}" in found["orthogonality-not-reached"]


def test_vectors_may_turn_towards_each_other_once_the_ranks_are_final():
    history = run()
    history.last("finish")["orthogonality"] = 0.9
    assert codes(history) == []


def test_the_loss_must_not_recover():
    history = run(loss_after_masks=3.0, target=1)
    for record in history.of("step"):
        if record["step"] > 260:
            record["loss"] = 0.3
    assert "budget-too-low" not in codes(history)


def test_a_rising_loss_with_worthless_pruned_triplets_is_not_the_budget():
    history = run(loss_after_masks=3.0, target=1)
    for record in history.of("allocation"):
        record["threshold"] = record["scores"]["q95"] * 0.01
    assert "budget-too-low" not in codes(history)


def test_a_training_cut_short():
    history = run(stop_at=220)  # the decrease ends at 208
    history.add("finish", step=220, ranks=[8] * 36, orthogonality=0.0, allocations=30)
    assert "training ended at step 220" in diagnose(history)[-1]["message"]


def test_a_gradient_that_comes_late_is_a_gradient():
    history = run(dead_modules=(3,))
    history.of("allocation")[2]["module_scores"][3] = 1e-9
    assert "no-gradient" not in codes(history)


def test_streaming_finds_the_same_and_each_code_once():
    history = run(score_noise=3.0, final=0.04, dead_modules=(0,))
    diagnostics = Diagnostics()
    before = copy.deepcopy(history.records)
    found = [f for record in history.records for f in diagnostics.update(record)]
    assert found == diagnose(history)
    assert len({f["code"] for f in found}) == len(found) >= 3
    assert history.records == before
    assert [f["step"] for f in found] == sorted(f["step"] for f in found)


def test_streaming_needs_no_start():
    assert Diagnostics().update({"event": "step", "step": 0, "loss": 1.0}) == []


def test_without_loss_or_allocations():
    assert codes(run(stop_at=0)) == []
    history = run()
    for record in history.of("step"):
        record["loss"] = None
    assert codes(history) == []


def test_live_findings_are_recorded_and_warned_of(tmp_path):
    finished, history = run(final=0.04, update_ratio=1e-6), History(tmp_path / "history.jsonl")
    diagnose_live(history)
    with pytest.warns(AdaLoraWarning) as warned:
        replay(finished, history)
    found = diagnose(finished)
    assert [f["code"] for f in found] == ["final-phase-too-short", "slow-start"]
    assert [str(w.message) for w in warned] == [f"{f['code']}: {f['message']}. {f['cause']} {f['cure']}" for f in found]
    recorded = History.read(tmp_path).of("diagnostic")
    assert [{k: r[k] for k in found[0]} for r in recorded] == found
    assert findings_of(history) == recorded


def test_live_findings_are_not_repeated_after_a_resume():
    history = run(final=0.04, stop_at=10)
    diagnose_live(history)
    history.add("step", step=11, phase="warmup", budget=432, live=432, loss=1.0)
    assert history.of("diagnostic") == []


def test_recorded_findings_are_not_doubled():
    history = run(final=0.04)
    recorded = diagnose(history)[0]
    history.add("diagnostic", **{k: v for k, v in recorded.items() if k != "cause"})
    found = findings_of(history)
    assert [f["code"] for f in found] == ["final-phase-too-short"]
    assert found[0]["cause"] == EXPLANATIONS["final-phase-too-short"][0]


def test_seeds_that_agree():
    histories = [run(seed=seed) for seed in range(3)]
    agreement = rank_agreement(histories)
    assert agreement.correlation > 0.9
    assert agreement.shared > 0.85 > agreement.expected
    assert diagnose_seeds(histories) == []


def test_seeds_that_disagree():
    random = np.random.default_rng(0)
    histories = [run(importance=random.permutation(importance_of(6, BERT))) for _ in range(3)]
    found = diagnose_seeds(histories)
    assert [f["code"] for f in found] == ["ranks-differ-between-seeds"]
    assert diagnose_seeds(histories, DiagnosticThresholds(seed_correlation=-1)) == []
    assert diagnose_seeds(histories, DiagnosticThresholds(ignore=("ranks-differ-between-seeds",))) == []


def test_nearly_even_ranks_agree_whatever_their_order():
    histories = [run(layers=1, stop_at=0) for _ in range(2)]
    histories[0].add("finish", step=20, ranks=[8, 9, 8, 8, 9, 8])
    histories[1].add("finish", step=20, ranks=[9, 8, 8, 9, 8, 8])
    assert rank_agreement(histories).correlation < 0
    assert diagnose_seeds(histories) == []
    assert len(diagnose_seeds(histories, DiagnosticThresholds(seed_shared=1.0))) == 1


def test_agreement_by_hand():
    histories = [run(layers=1, steps=20, stop_at=0) for _ in range(2)]
    histories[0].add("finish", step=20, ranks=[0, 1, 2, 3, 4, 5])
    histories[1].add("finish", step=20, ranks=[5, 1, 2, 3, 4, 0])
    agreement = rank_agreement(histories)
    assert agreement.shared == pytest.approx(10 / 15)
    assert agreement.correlation == pytest.approx(-3 / 7)
    assert agreement.expected == pytest.approx(sum(min(i, j) for i in range(6) for j in range(6)) / 36 * 6 / 15)


def test_equal_ranks_have_no_correlation():
    agreement = rank_agreement([run(stop_at=0), run(stop_at=0)])
    assert agreement.correlation is None
    assert agreement.shared == 1


def test_agreement_needs_the_same_modules():
    with pytest.raises(HistoryError, match="run 2 does not adapt the same modules"):
        rank_agreement([run(stop_at=0), run(stop_at=0, layers=5)])
    with pytest.raises(HistoryError, match="at least two"):
        rank_agreement([run(stop_at=0)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"final_share": 1.5}, "final_share=1.5: Input should be less than 1"),
        ({"ignore": ("no-gradients",)}, "'no-gradients' is no diagnostic; known: unstable-scores"),
        ({"finalshare": 0.1}, "has no field 'finalshare'; known fields: ignore, min_steps, revived_share"),
    ],
)
def test_wrong_thresholds(fields, message):
    with pytest.raises(ConfigError, match=message):
        DiagnosticThresholds(**fields)


def with_revivals(history, places):
    """The same history, each allocation reviving the given triplets."""
    records = copy.deepcopy(history.records)
    changed = History()
    changed.records = records
    for record in changed.of("allocation"):
        record["revived_triplets"] = places
    return changed


def test_few_triplets_that_revive_again_and_again():
    """Below the share of all, but the same ones each time."""
    history = run(score_noise=0.0)
    assert "unstable-scores" not in codes(history)
    target = history.last("start")["target_budget"]
    places = [[i // 12, i % 12] for i in range(target // 20 + 1)]
    (found,) = diagnose(with_revivals(history, places))
    assert found["code"] == "unstable-scores"
    assert f"{len(places)} triplets have been revived 4 times or more" in found["message"]
    name = history.last("start")["modules"][0]["name"]
    assert f"most often: {name}[0] (4 times), {name}[1] (4 times)" in found["message"]
    assert diagnose(with_revivals(history, places[:-1])) == []


def test_short_runs_are_not_judged():
    short = {"steps": 99, "interval": 1, "final": 0.02}
    assert codes(run(**short)) == []
    assert "final-phase-too-short" in codes(run(**short), min_steps=99)


def test_watching_twice_warns_once():
    history = History()
    first = diagnose_live(history, DiagnosticThresholds(final_share=0.3))
    assert diagnose_live(history) is first
    assert len(history.listeners) == 1
    start = run(final=0.2).last("start")
    with pytest.warns(AdaLoraWarning, match="final-phase-too-short") as raised:
        history.add(**start)
    assert len(raised) == 1
    assert [r["event"] for r in history] == ["start", "thresholds", "diagnostic"]
    assert history.last("thresholds")["final_share"] == 0.3
