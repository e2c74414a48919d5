import json
import re

import pytest
from pydantic import ValidationError

from adalora.config import AdaLoraConfig
from adalora.errors import ConfigError

REFUSED = [
    # Names
    ({"target_rnak": 4}, "AdaLoraConfig has no field 'target_rnak': did you mean 'target_rank'?"),
    ({"zzz": 1}, "AdaLoraConfig has no field 'zzz': known fields: target_rank, total_rank, total_parameters, "),
    # Budgets
    ({"target_rank": 4, "total_rank": 96}, "give one budget, not target_rank and total_rank: keep target_rank=4.0"),
    ({"target_rank": 0}, "target_rank=0.0 must be above 0, e.g. target_rank=8"),
    ({"total_rank": -3}, "total_rank=-3 must be above 0, e.g. total_rank=96"),
    ({"target_rank": "many"}, "target_rank='many': Input should be a valid number"),
    ({"total_rank": 1.5}, "total_rank=1.5: Input should be a valid integer"),
    ({"min_rank": -1}, "min_rank=-1: Input should be greater than or equal to 0"),
    ({"max_rank": 0}, "max_rank=0: Input should be greater than or equal to 1"),
    ({"min_rank": 4, "max_rank": 2}, "max_rank=2 is below min_rank=4: raise the one or lower the other"),
    (
        {"target_rank": 6, "max_rank": 4},
        "max_rank=4 is below the average that is wanted, target_rank=6: use target_rank=4 or max_rank=6",
    ),
    ({"max_rank": 7}, "max_rank=7 is below the average that is wanted, target_rank=8: use target_rank=7 or max_rank=8"),
    ({"max_rank": {"key": -1}}, "Input should be greater than or equal to 0"),
    ({"max_rank": {"key": True}}, "max_rank={'key': True}: "),
    ({"min_rank": {}}, 'min_rank={}: has no entry: give names with numbers, e.g. {"query": 2}, or leave it out'),
    ({"group_budgets": {}, "budget_scope": "layer"}, "group_budgets={}: has no entry"),
    ({"group_budgets": {"query": -1.0}, "budget_scope": "layer"}, "Input should be greater than or equal to 0"),
    ({"group_budgets": 3, "budget_scope": "layer"}, "group_budgets=3: Input should be a valid dictionary"),
    (
        {"group_budgets": {"query": 2}},
        'group_budgets has no effect with budget_scope="global": add budget_scope="module_type" or "layer"',
    ),
    # Spans
    ({"warmup": -0.1}, "warmup=-0.1: is a fraction of the run (0.0 to 1.0) or a number of optimizer steps, not neg"),
    ({"final": -5}, "final=-5: is a fraction of the run (0.0 to 1.0) or a number of optimizer steps, not negative"),
    ({"allocation_interval": 1.5}, "allocation_interval=1.5: is a fraction of at most 1.0 or a whole number of steps"),
    ({"warmup": 12.4}, "warmup=12.4: is a fraction of at most 1.0 or a whole number of steps, e.g. 12"),
    ({"warmup": 0.7, "final": 0.6}, "are together more than the run (1.0): lower one of them, e.g. final=0.3"),
    # Choices
    ({"schedule": "quadratic"}, "='quadratic': Input should be 'cubic', 'linear', 'step' or 'constant'"),
    (
        {"schedule": -1.0},
        "schedule=-1.0: as a number is the exponent of the decrease and must be above 0; cubic is 3.0",
    ),
    ({"schedule": 0.0}, "must be above 0; cubic is 3.0"),
    ({"importance": "sensitive"}, "importance='sensitive': Input should be 'sensitivity_uncertainty', 'ratio', "),
    ({"orthogonality": "loss"}, "orthogonality='loss': Input should be 'decoupled', 'squared', 'released' or 'off'"),
    (
        {"scale": "rslora"},
        "scale='rslora': Input should be 'target', 'initial', 'matched' or 'released' or Input ",
    ),
    # Numbers
    ({"sensitivity_beta": 1.0}, "sensitivity_beta=1.0: Input should be less than 1"),
    ({"sensitivity_beta": 0.0}, "sensitivity_beta=0.0: Input should be greater than 0"),
    ({"uncertainty_beta": 1.0}, "uncertainty_beta=1.0: Input should be less than 1"),
    ({"uncertainty_beta": -0.2}, "uncertainty_beta=-0.2: Input should be greater than 0"),
    ({"orthogonality_weight": -0.1}, "orthogonality_weight=-0.1: Input should be greater than or equal to 0"),
    ({"handover": "maybe"}, "handover='maybe': Input should be a valid boolean"),
    ({"revival": 7}, "revival=7: Input should be a valid boolean"),
    ({"compact": None}, "compact=None: Input should be a valid boolean"),
    ({"seed": "x"}, "seed='x': Input should be a valid integer"),
    # Amounts
    ({"total_parameters": "many"}, "total_parameters='many': is a number or a text such as \"0.3M\" or 300_000"),
    ({"total_parameters": "3MB"}, 'is a number or a text such as "0.3M"'),
    ({"total_parameters": 0}, "total_parameters=0 must be above 0"),
    ({"total_parameters": True}, "total_parameters=True: is true or false where a number or a name is wanted"),
    ({"adapter_bytes": "1.2 megabytes"}, 'is a number or a text such as "1.2MB" or 1_200_000'),
    ({"adapter_bytes": -5}, "adapter_bytes=-5 must be above 0"),
    (
        {"total_parameters": "1M", "target_rank": 2},
        "give one budget, not target_rank and total_parameters: keep target_rank=2.0",
    ),
    (
        {"total_parameters": "1M", "budget_cost": "rank"},
        'budget_cost="rank" contradicts a budget in parameters or bytes: leave it out',
    ),
    ({"budget_cost": "flops"}, "budget_cost='flops': Input should be 'rank' or 'parameters'"),
    ({"budget_scope": "block"}, "budget_scope='block': Input should be 'global', 'layer' or 'module_type'"),
    # Parametrizations
    ({"parametrization": "usv"}, "parametrization='usv': Input should be 'lora' or 'svd'"),
    (
        {"parametrization": "svd", "initialization": "zeros"},
        "Input should be 'keep', 'orthonormal' or 'gaussian'",
    ),
    ({"scale": -2.0}, "scale=-2.0: as a number is s in ΔW = s·P·Λ·Q and must be above 0"),
    ({"score_weights": "between"}, "score_weights='between': Input should be 'after' or 'before'"),
    ({"score_gradient": "loss"}, "score_gradient='loss': Input should be 'total' or 'task'"),
    ({"reorthonormalize": 2}, "reorthonormalize=2: Input should be a valid boolean"),
    ({"released_schedule": "x"}, "released_schedule='x': Input should be a valid boolean"),
    *[
        ({name: value}, f'{name}="{value}" needs parametrization="svd": with "lora" λ has no value of its own')
        for name, value in [
            ("initialization", "orthonormal"),
            ("initialization", "gaussian"),
            ("scale", "released"),
            ("importance", "lambda_magnitude"),
            ("orthogonality", "squared"),
            ("orthogonality", "released"),
        ]
    ],
    ({"parametrization": "svd", "handover": True}, 'handover=True needs parametrization="lora"'),
    (
        {"parametrization": "svd", "scale": "matched", "initialization": "keep"},
        'scale="matched" has no effect with initialization="keep": use scale="target"',
    ),
    ({"nested": True, "reorthonormalize": True}, "nested=True contradicts reorthonormalize=True: the order is that of"),
    ({"nested": True, "compact": False}, "nested=True needs compact=True: the order is that of the triplets that stay"),
    ({"nested": True, "final": 0}, "nested has no effect with final=0 (it acts in the final phase): leave it out"),
    ({"compact_at": (0.5,), "compact": False}, "compact_at has no effect with compact=False: leave one of them out"),
    ({"compact_at": ()}, "compact_at=(): is a list of fractions of the decrease, above 0 and at most 1, e.g. (0.5, 0."),
    (
        {"compact_at": (0.0, 0.5)},
        "compact_at=(0.0, 0.5): is a list of fractions of the decrease, above 0 and at most 1",
    ),
    ({"compact_at": (0.5, 1.5)}, "above 0 and at most 1, e.g. (0.5, 0.75)"),
    ({"nested": "often"}, "nested='often': Input should be a valid boolean"),
    ({"seed": True}, "seed=True: is true or false where a number or a name is wanted"),
    ({"pace": "slow"}, "pace='slow': Input should be 'steady' or 'fixed'"),
    # Without effect
    ({"pace": "steady", "scale": "matched"}, "pace has no effect with scale='matched' (it is that of the initial"),
    ({"pace": "steady", "parametrization": "svd"}, 'pace has no effect with parametrization="svd" (λ has a pace of'),
    *[
        ({"importance": "magnitude", name: value}, f'{name} has no effect with importance="magnitude" (no gradient')
        for name, value in [
            ("sensitivity_beta", 0.5),
            ("uncertainty_beta", 0.5),
            ("score_weights", "before"),
            ("score_gradient", "task"),
        ]
    ],
    (
        {"importance": "sensitivity", "uncertainty_beta": 0.5},
        'uncertainty_beta has no effect with importance="sensitivity" (no uncertainty in it): leave it out',
    ),
    *[
        ({"seed": 3, **fields}, "seed has no effect with these settings (nothing is drawn at random): leave it out")
        for fields in (
            {},
            {"parametrization": "svd", "initialization": "keep"},
            {"importance": "ratio"},
            {"schedule": "constant"},
        )
    ],
    ({"handover": True, "warmup": 0}, "handover has no effect with warmup=0 (it is at the end of it): leave it out"),
    (
        {"parametrization": "svd", "orthogonality": "squared", "orthogonality_weight": 0, "score_gradient": "task"},
        "score_gradient has no effect with orthogonality_weight=0: leave it out",
    ),
    ({"score_gradient": "task"}, 'score_gradient has no effect with orthogonality="decoupled"'),
    (
        {"orthogonality": "off", "orthogonality_weight": 0.5},
        'orthogonality_weight has no effect with orthogonality="off": leave it out',
    ),
    *[
        ({"schedule": "constant", name: value}, f'{name} has no effect with schedule="constant" (no allocation)')
        for name, value in [
            ("importance", "ratio"),
            ("min_rank", 1),
            ("max_rank", 9),
            ("allocation_interval", 5),
            ("warmup", 0.1),
            ("final", 100),
            ("revival", False),
            ("budget_scope", "layer"),
            ("group_budgets", {"query": 2}),
            ("budget_cost", "parameters"),
            ("released_schedule", True),
            ("reorthonormalize", True),
            ("handover", False),
            ("nested", True),
            ("compact", False),
            ("pace", "steady"),
            ("compact_at", (0.5,)),
            ("score_weights", "before"),
            ("sensitivity_beta", 0.5),
        ]
    ],
]
# What tells the reader what to write instead.
CURE = re.compile(
    r"Input should be|leave (it|one of them) out|did you mean|known fields|e\.g\. |such as|\b(keep|use|add|needs) \w+=|"
    r"must be above 0|raise the one or lower the other|a fraction of|not negative|is wanted"
)


@pytest.mark.parametrize(
    ("fields", "message"), REFUSED, ids=[",".join(f"{k}={v}" for k, v in f.items()) for f, _ in REFUSED]
)
def test_a_refusal_names_field_value_and_what_is_allowed(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        AdaLoraConfig(**fields)


def refusal(fields):
    with pytest.raises(ConfigError) as caught:
        AdaLoraConfig(**fields)
    return str(caught.value)


@pytest.mark.parametrize("name", list(AdaLoraConfig.model_fields))
def test_every_field_has_a_refusal_of_its_own(name):
    """A field that comes without a case of what is refused fails here."""
    mine = [fields for fields, _ in REFUSED if name in fields and re.search(rf"\b{name}\b", refusal(fields))]
    assert mine, f"add a case for {name} to REFUSED"
    # A value that is wrong by itself, not only beside others: of the wrong type or out of range.
    wrong = [fields[name] for fields in mine if f"{name}={fields[name]!r}" in refusal(fields)]
    assert wrong, name


@pytest.mark.parametrize("fields", [fields for fields, _ in REFUSED], ids=str)
def test_every_refusal_says_what_to_write_instead(fields):
    assert CURE.search(refusal(fields))


@pytest.mark.parametrize("name", list(AdaLoraConfig.model_fields))
@pytest.mark.parametrize("value", [object(), [1], {1: 2}, float("nan"), float("inf"), None])
def test_no_field_takes_what_is_no_value_of_its_kind(name, value):
    """Each field alone; None only where it means "not given"."""
    if (value is None and AdaLoraConfig.model_fields[name].default is None) or (name, value) == ("compact_at", [1]):
        return
    assert name in refusal({name: value})


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        AdaLoraConfig(min_rank=-1, sensitivity_beta=2.0)
    assert "min_rank=-1" in str(caught.value)
    assert "sensitivity_beta=2.0" in str(caught.value)


def test_without_a_budget_it_is_eight():
    assert AdaLoraConfig().target_rank == 8
    assert AdaLoraConfig(total_rank=96).target_rank is None
    assert AdaLoraConfig(target_rank=1.5).target_rank == 1.5


@pytest.mark.parametrize(("value", "kept"), [(0.25, 0.25), (0.0, 0.0), (100, 100), (100.0, 100), (1.0, 1), (1, 1)])
def test_spans_are_fractions_or_whole_steps(value, kept):
    config = AdaLoraConfig(warmup=value)
    assert config.warmup == kept
    assert type(config.warmup) is type(kept)


@pytest.mark.parametrize(
    ("name", "text", "number"),
    [
        ("total_parameters", "0.3M", 300_000),
        ("total_parameters", "12k", 12_000),
        ("total_parameters", "1.5 G", 1_500_000_000),
        ("total_parameters", "640", 640),
        ("adapter_bytes", "1.2MB", 1_200_000),
        ("adapter_bytes", "1MiB", 1_048_576),
        ("adapter_bytes", "640B", 640),
        ("adapter_bytes", "2k", 2_000),
    ],
)
def test_amounts_as_text(name, text, number):
    config = AdaLoraConfig(**{name: text})
    assert getattr(config, name) == number
    assert config.budget_cost == "parameters"
    assert config.target_rank is None


def test_defaults_follow_the_parametrization():
    assert (AdaLoraConfig().initialization, AdaLoraConfig().scale) == ("keep", "initial")
    assert AdaLoraConfig().handover
    svd = AdaLoraConfig(parametrization="svd")
    assert (svd.initialization, svd.handover, svd.scale) == ("orthonormal", False, "target")


def test_presets_can_be_changed_and_are_checked():
    assert AdaLoraConfig.released(target_rank=3, compact=True).compact
    assert AdaLoraConfig.paper().orthogonality == "squared"
    with pytest.raises(ConfigError, match="did you mean 'target_rank'"):
        AdaLoraConfig.paper(target_rnk=3)


@pytest.mark.parametrize("shape", ["cubic", "linear", "step", "constant", 2.5])
def test_schedules(shape):
    assert AdaLoraConfig(schedule=shape).schedule == shape


def test_a_constant_schedule_is_one_phase():
    config = AdaLoraConfig(schedule="constant")
    assert (config.warmup, config.final, config.handover) == (0, 0, False)
    assert AdaLoraConfig(**config.to_dict()) == config
    for preset in (AdaLoraConfig.paper, AdaLoraConfig.released):
        assert preset(schedule="constant").orthogonality == preset().orthogonality
        with pytest.raises(ConfigError, match="compact has no effect"):
            preset(schedule="constant", compact=True)


def test_a_weight_of_zero_goes_with_orthogonality_off():
    assert AdaLoraConfig(orthogonality="off", orthogonality_weight=0).orthogonality_weight == 0


def test_it_cannot_be_changed():
    config = AdaLoraConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.target_rank = 4


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_rank": 4},
        {"total_rank": 96, "warmup": 100, "final": 0.5, "schedule": 2.0},
        {"schedule": "constant", "orthogonality": "off", "scale": "initial"},
        {"min_rank": 1, "max_rank": 9, "revival": False, "importance": "random", "seed": 3},
        {"total_parameters": 300_000, "budget_scope": "layer"},
        {"min_rank": {"layer.0.*": 2}, "max_rank": {"key": 0}},
        {"group_budgets": {"query": 2, "up": 0.5}, "budget_scope": "module_type"},
        {"parametrization": "svd", "scale": 2.5, "orthogonality": "squared", "score_gradient": "task"},
        AdaLoraConfig.paper(target_rank=2).to_dict(),
        AdaLoraConfig.released(target_rank=2, warmup=10).to_dict(),
    ],
)
def test_round_trip_through_json(fields):
    config = AdaLoraConfig(**fields)
    again = AdaLoraConfig(**json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert config.to_dict().keys() == fields.keys()
