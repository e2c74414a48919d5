"""Every mode of the method against the literal oracle, side by side for more than 100 steps with scores.

At each step: the gradients that the optimizer gets, the scores, the budget, the masks, and the weights that are left.
"""

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import get_args

import pytest
import torch
from oracle import Grouped, Oracle, Sometimes, as_singular_vectors, layers_of

import adalora
from adalora import config as config_module
from adalora.config import AdaLoraConfig
from helpers.toys import Blocks, adamw, batch, lora

STEPS, WARMUP, FINAL, INTERVAL = 122, 6, 12, 4
SVD = {"parametrization": "svd"}
# Orthonormal factors have ∇R = 0 to rounding, and rounding is nothing to compare.
COUPLED = {**SVD, "initialization": "gaussian", "orthogonality": "squared", "orthogonality_weight": 0.2}
SCORES = get_args(config_module.Importance)
SCHEDULES = [*get_args(config_module.Schedule), 1.0, 1.5, 2.0, 6.0, 0.4]
GROUPED = {"rank_pattern": {"mix": 6, "deep": 6}}  # three triplets in each group
GROUPS = {"query": 0.5, "down": 1, "head": 2}


TARGETS = {
    Blocks: ["query", "down", "head"],
    Sometimes: ["words", "mix", "first", "second", "out"],
    Grouped: ["words", "mix", "deep", "out"],
}


@dataclass
class Mode:
    """Settings beside the ones above, and what else is unusual about the run."""

    settings: dict
    lora: dict = field(default_factory=dict)
    base: type = Blocks
    dtype: torch.dtype = torch.float64
    optimizer: type = torch.optim.AdamW
    bad: int = 0  # every so many steps a gradient is not finite


def budgets():
    """Every unit and cost."""
    units = {
        "target_rank": {"target_rank": 1.4},
        "total_rank": {"total_rank": 4},
        "total_parameters": {"total_parameters": 110},
        "total_parameters_text": {"total_parameters": "0.1k"},
        "adapter_bytes": {"adapter_bytes": 960},
        "adapter_bytes_text": {"adapter_bytes": "1kB"},
        "rank_at_its_price": {"target_rank": 1.2, "budget_cost": "parameters"},
        "total_rank_at_its_price": {"total_rank": 6, "budget_cost": "parameters"},
    }
    for name, unit in units.items():
        yield f"budget_{name}", Mode(unit)
        yield f"budget_{name}_svd", Mode({**unit, **SVD})


def groups():
    """Every scope with every cost, with and without budgets of its own."""
    for scope in ("layer", "module_type"):
        for cost in ("rank", "parameters"):
            given = {"target_rank": 1, "budget_scope": scope, "budget_cost": cost}
            yield f"scope_{scope}_{cost}", Mode(given)
    yield "scope_layer_bytes", Mode({"adapter_bytes": 1200, "budget_scope": "layer"})
    kinds = {"budget_scope": "module_type", "group_budgets": GROUPS}
    yield "groups_alone", Mode(kinds)
    yield "groups_alone_parameters", Mode({**kinds, "budget_cost": "parameters"})
    part = {"budget_scope": "layer", "group_budgets": {"layers.1": 1.5}}
    yield "groups_and_rest", Mode({**part, "target_rank": 1.2})
    yield "groups_and_rest_svd", Mode({**part, "total_rank": 7, **SVD})
    yield "groups_floor", Mode({"target_rank": 1.2, "budget_scope": "module_type", "min_rank": 1})


def bounds():
    """Floors and caps."""
    costly = {"target_rank": 1.4, "budget_cost": "parameters"}
    for name, given in {
        "floor": {"min_rank": 1},
        "cap": {"max_rank": 2},
        "floor_and_cap": {"min_rank": 1, "max_rank": 2},
        "floor_by_name": {"min_rank": {"layers.0.*": 1, "head": 2}},
        "cap_by_name": {"max_rank": {"query": 0, "down": 2}},
    }.items():
        yield name, Mode({"target_rank": 1.4, **given})
        yield f"{name}_parameters", Mode({**costly, **given})
    yield "cap_no_revival", Mode({"target_rank": 1.4, "revival": False, "max_rank": {"query": 0, "down": 2}})
    yield "floor_no_revival", Mode({"target_rank": 1.4, "revival": False, "min_rank": 1})


def scores():
    """Every score, and what goes into it."""
    for score in SCORES:
        measured = "magnitude" in score or score == "random"
        yield f"{score}_coupled", Mode({**COUPLED, "importance": score})
        yield f"{score}_svd", Mode({**SVD, "importance": score, "seed": 3})
        if score != "lambda_magnitude":
            yield f"{score}_lora", Mode({"importance": score, **({"seed": 3} if score == "random" else {})})
            yield f"{score}_no_handover", Mode({"importance": score, "handover": False})
        if not measured:
            yield f"{score}_before", Mode({"importance": score, "score_weights": "before"})
            yield f"{score}_parameters", Mode({"importance": score, "total_parameters": 110})
    for orthogonality in ("squared", "released"):
        for gradient in ("total", "task"):
            for weights in ("before", "after"):
                given = {"orthogonality": orthogonality, "score_gradient": gradient, "score_weights": weights}
                yield f"{orthogonality}_{gradient}_{weights}", Mode({**COUPLED, **given})
    yield "betas", Mode({"sensitivity_beta": 0.5, "uncertainty_beta": 0.97})
    yield "betas_svd", Mode({**SVD, "sensitivity_beta": 0.95, "uncertainty_beta": 0.3})


def others():
    """Orthogonality, parametrizations, starts, ends, types, layers, optimizers, presets."""
    for orthogonality in ("decoupled", "off"):
        for name, kind in {"lora": {}, "svd": SVD, "gaussian": {**SVD, "initialization": "gaussian"}}.items():
            yield f"{orthogonality}_{name}", Mode({**kind, "orthogonality": orthogonality})
            yield (
                f"{orthogonality}_{name}_before",
                Mode({**kind, "orthogonality": orthogonality, "score_weights": "before"}),
            )
    yield "weight_0", Mode({"orthogonality_weight": 0.0})
    yield "weight_1", Mode({"orthogonality_weight": 1.0})
    for start in ("keep", "orthonormal", "gaussian"):
        yield f"start_{start}", Mode({**SVD, "initialization": start, **({} if start == "keep" else {"seed": 5})})
    for schedule in SCHEDULES:
        yield f"schedule_{schedule}", Mode({"schedule": schedule})
        yield f"schedule_{schedule}_svd", Mode({**SVD, "schedule": schedule})
    yield "released_schedule", Mode({"released_schedule": True, "warmup": 5})
    yield "every_step", Mode({"allocation_interval": 1})
    yield "odd_interval", Mode({"allocation_interval": 7, "warmup": 0, "handover": False})
    yield "no_final_phase", Mode({"final": 0})
    for name, kind in {"lora": {}, "svd": SVD}.items():
        yield f"no_revival_{name}", Mode({**kind, "revival": False})
        yield f"no_revival_parameters_{name}", Mode({**kind, "revival": False, "total_parameters": 110})
        yield f"reorthonormalize_{name}", Mode({**kind, "reorthonormalize": True, "allocation_interval": 11})
        yield f"compact_{name}", Mode({**kind, "compact": True})
        yield f"compact_at_{name}", Mode({**kind, "compact": True, "compact_at": (0.25, 0.5)})
        yield f"target_is_initial_{name}", Mode({**kind, "target_rank": 3})
        yield f"budget_of_one_{name}", Mode({**kind, "total_rank": 1, "compact": True})
        yield f"every_kind_of_layer_{name}", Mode({**kind, "target_rank": 1}, base=Sometimes)
        yield f"every_kind_of_layer_parameters_{name}", Mode({**kind, "total_parameters": 60}, base=Sometimes)
        yield f"sgd_{name}", Mode(kind, optimizer=torch.optim.SGD)
        yield f"bfloat16_{name}", Mode(kind, dtype=torch.bfloat16)
        yield f"float32_{name}", Mode(kind, dtype=torch.float32)
        yield f"bad_gradients_{name}", Mode(kind, bad=9)
        yield f"unequal_ranks_{name}", Mode(kind, lora={"rank_pattern": {"query": 2, "head": 1}})
        yield f"rslora_{name}", Mode({**kind, "importance": "magnitude"}, lora={"use_rslora": True})
        for mode, given in {
            "grouped": {"target_rank": 2},
            "grouped_parameters": {"total_parameters": 130},
            "grouped_magnitude": {"target_rank": 2, "importance": "magnitude"},
            "grouped_compact": {"target_rank": 2, "compact": True, "compact_at": (0.5,)},
            "grouped_reorthonormalize": {"target_rank": 2, "reorthonormalize": True, "allocation_interval": 11},
            "grouped_bounds": {"target_rank": 2.5, "min_rank": {"mix": 1, "deep": 2}, "max_rank": {"mix": 5, "out": 2}},
        }.items():
            yield f"{mode}_{name}", Mode({**kind, **given}, lora=GROUPED, base=Grouped)
    for mode, given in {
        "scale": {"scale": "matched", "importance": "magnitude"},
        "lambda_magnitude": {"importance": "lambda_magnitude"},
        "released": {**COUPLED, "orthogonality": "released"},
        "squared": COUPLED,
    }.items():
        yield f"grouped_{mode}", Mode({**SVD, "target_rank": 2, **given}, lora=GROUPED, base=Grouped)
    yield "revival_coupled_every_layer", Mode({**COUPLED, "target_rank": 1}, base=Sometimes)
    for scale in ("target", "initial", 0.7):
        yield f"scale_{scale}", Mode({"scale": scale, "importance": "magnitude"})
    for scale in ("matched", "released"):
        yield f"scale_{scale}", Mode({**SVD, "scale": scale, "importance": "magnitude"})
    yield "paper", Mode(AdaLoraConfig.paper().to_dict())
    yield "released", Mode({**AdaLoraConfig.released().to_dict(), "warmup": 7})


MODES = dict(pair for kinds in (scores, others, budgets, groups, bounds) for pair in kinds())


def test_every_choice_of_every_field_has_a_mode():
    """A new score, schedule or choice without a mode is a gap in the table."""
    used = {name: set() for name in AdaLoraConfig.model_fields}
    for mode in MODES.values():
        for name, value in AdaLoraConfig(**settings_of(mode)).model_dump().items():
            used[name].add(str(value))
    for name, info in AdaLoraConfig.model_fields.items():
        if name == "nested":  # acts after the last allocation: tests/lora/steps/test_nested.py
            continue
        choices = [c for part in (info.annotation, *get_args(info.annotation)) for c in get_args(part)]
        named = {str(c) for c in choices if isinstance(c, str)} | (
            {"True", "False"} if info.annotation is bool else set()
        )
        assert named <= used[name], (name, named - used[name])
        assert len(used[name]) > 1, name


def settings_of(mode):
    """The mode's settings, filled up with the common ones."""
    given = {**mode.settings}
    common = {"warmup": WARMUP, "final": FINAL, "allocation_interval": INTERVAL}
    constant = given.get("schedule") == "constant"
    if constant:
        common = {}
    if not any(name in given for name in (*config_module.BUDGET_FIELDS, "group_budgets")):
        common["total_rank"] = 5
    return {**common, **({} if constant else {"compact": False}), **given}


def of_name(given, name, default):
    """A floor or a cap: the first pattern that is the name or its end."""
    if isinstance(given, dict):
        return next((v for p, v in given.items() if fnmatchcase(name, p) or fnmatchcase(name, f"*.{p}")), default)
    return default if given is None else given


def group_of(name, scope):
    parts = name.split(".")
    return {"global": "", "layer": ".".join(parts[:2]) if len(parts) > 1 else "", "module_type": parts[-1]}[scope]


def targets_of(config, modules, names, prices):
    """b_T of each group, and each module's group: own budgets, the rest in proportion with the largest remainders."""
    kinds = list(dict.fromkeys(group_of(name, config.budget_scope) for name in names))
    group = [kinds.index(group_of(name, config.budget_scope)) for name in names]
    of_rank_1 = [p / m.groups for p, m in zip(prices, modules)]
    price = [sum(p for p, g in zip(of_rank_1, group) if g == k) for k in range(len(kinds))]
    full = [sum(p * m.rank for p, m, g in zip(prices, modules, group) if g == k) for k in range(len(kinds))]
    own = {kinds.index(k): round(v * price[kinds.index(k)]) for k, v in (config.group_budgets or {}).items()}
    if config.total_parameters or config.adapter_bytes:
        whole = config.total_parameters or config.adapter_bytes
    elif config.target_rank is not None:
        whole = round(config.target_rank * sum(of_rank_1))
    else:
        whole = round(config.total_rank * sum(prices) / len(prices)) if config.total_rank else sum(own.values())
    rest, sharing = whole - sum(own.values()), [k for k in range(len(kinds)) if k not in own]
    exact = {k: Fraction(rest * full[k], sum(full[s] for s in sharing)) for k in sharing}
    shares = {k: int(exact[k]) for k in sharing}
    for k in sorted(sharing, key=lambda k: shares[k] - exact[k])[: rest - sum(shares.values())]:
        shares[k] += 1
    return [own.get(k, shares.get(k)) for k in range(len(kinds))], group


def make_oracle(config, model, names, dtype):
    modules = layers_of(model, names, own_lambda=config.parametrization == "svd")
    sizes = [m.d_out + m.d_in for m in modules]
    if config.adapter_bytes:
        prices = [size * torch.finfo(dtype).bits // 8 for size in sizes]
    elif config.budget_cost == "parameters":
        prices = [size + (config.parametrization == "svd") * m.groups for size, m in zip(sizes, modules)]
    else:
        prices = [1] * len(sizes)
    targets, group = targets_of(config, modules, names, prices)
    return Oracle(
        modules,
        config,
        total_steps=STEPS,
        prices=prices,
        targets=targets,
        groups=group,
        floors=[-(-of_name(config.min_rank, name, 0) // m.groups) for name, m in zip(names, modules)],
        caps=[of_name(config.max_rank, name, 99) // m.groups for name, m in zip(names, modules)],
    )


def flat(parts):
    """All numbers of all layers as one vector."""
    return torch.cat([t.flatten() for mine in parts for t in mine or []] or [torch.zeros(0, dtype=torch.float64)])


class Run:
    """A model in training with what the optimizer and the controller's decisions looked like."""

    def __init__(self, mode, device="cpu"):
        self.mode, self.device = mode, device
        torch.manual_seed(1)
        self.model = lora(r=3, targets=TARGETS[mode.base], base=mode.base, **mode.lora).to(device, mode.dtype)
        self.config = AdaLoraConfig(**settings_of(mode))
        self.controller = adalora.attach(self.model, self.config, total_steps=STEPS)
        self.oracle = make_oracle(self.config, self.model, list(self.controller.ranks), mode.dtype)
        self.lr = 1e-2 if mode.optimizer is torch.optim.AdamW else 5e-3
        self.decisions = decisions = []
        wrapped = self.controller._record.allocation

        def record(schedule, step, **given):  # knows nothing of `self`: the controller may not keep its model alive
            decisions.append((step, given["scores"].double().tolist(), given["keep"].tolist()))
            wrapped(schedule, step, **given)

        self.controller._record.allocation = record

        class Guarded(mode.optimizer):
            """Leaves a step out whose gradients are not finite, as loops with a check of their own do."""

            def step(self, closure=None):
                grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
                if all(bool(grad.isfinite().all()) for grad in grads):
                    super().step(closure)

        kind = Guarded if mode.bad else mode.optimizer
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = adamw(self.model, lr=self.lr) if kind is torch.optim.AdamW else kind(trained, lr=self.lr)

    def backward(self, step):
        self.optimizer.zero_grad()
        if self.mode.base is Blocks:
            x, y = batch(step, dtype=self.mode.dtype)
            out, y = self.model(x.to(self.device)), y.to(self.device)
        else:
            generator = torch.Generator().manual_seed(step)
            words = torch.randint(9, (16, 4), generator=generator)
            y = torch.nn.functional.one_hot(words[:, 0] % 3, 3).to(self.mode.dtype)
            out, y = self.model(words.to(self.device), extra=step % 3 != 0), y.to(self.device)
        (out - y).square().mean().backward()
        if self.mode.bad and step % self.mode.bad == 4:
            self.optimizer.param_groups[0]["params"][0].grad[0, 0] = torch.inf

    def step(self, step):
        """One step of both; the oracle's prediction and what came out are compared."""
        oracle, got = self.oracle, {}
        before = [m.matrices() for m in oracle.modules]
        task = [m.gradients() for m in oracle.modules]
        total = oracle.with_term(before, task)

        def pre(*_):
            got["gradients"] = [m.gradients() for m in oracle.modules]

        def post(*_):  # an optimizer's own hooks run before the global ones: the controller has moved nothing yet
            got["weights"] = [m.matrices() for m in oracle.modules]

        hooks = self.optimizer.register_step_pre_hook(pre), self.optimizer.register_step_post_hook(post)
        decided = len(self.decisions)
        self.optimizer.step()
        for hook in hooks:
            hook.remove()
        self.compare_gradients(got["gradients"], total)
        got["weights"] = oracle.lengthened(before, got["weights"])
        oracle.observe(before, got["weights"], task, total)
        weights = oracle.regularised(got["weights"], lr=self.lr)
        self.decide(step, weights, new=self.decisions[decided:])
        self.compare_weights(step, weights)
        oracle.step += 1

    def compare_gradients(self, seen, expected):
        assert [mine is None for mine in seen] == [theirs is None for theirs in expected]
        slack = 2e-2 if self.mode.dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(flat(seen), flat(expected), rtol=slack, atol=1e-2 * slack, equal_nan=True)

    def decide(self, step, weights, *, new):
        """Scores of every step and, where it is time, the masks."""
        oracle = self.oracle
        assert len(new) == oracle.allocates
        measured = self.config.importance in ("magnitude", "lambda_magnitude", "random")
        if not new:
            if not measured and oracle.observes:
                self.compare_scores(self.controller._scorer.scores().double().tolist(), oracle.scores(weights))
            return
        ((at, fast, keep),) = new
        expected = oracle.scores(weights, draw=True)
        live = [alive for m in oracle.modules for alive in m.live]
        assert at == step
        assert self.controller.schedule.budget(step) == oracle.budget
        part = [i for i, alive in enumerate(live) if alive or self.config.revival]
        self.compare_scores([fast[i] for i in part], [expected[i] for i in part])
        # On the same scores the choice is the same, always; on its own an oracle in float64 may see a tie otherwise.
        assert keep == oracle.keep(fast)
        own = oracle.keep(expected)
        if keep != own:
            self.near_ties += 1
            worth = [sum(expected[i] for i in part if mask[i]) for mask in (keep, own)]
            assert worth[0] == pytest.approx(worth[1], rel=1e-3)
        self.masks.add(tuple(keep))
        oracle.prune(keep)

    near_ties, compared = 0, 0

    def compare_scores(self, fast, expected):
        wanted = torch.tensor(expected, dtype=torch.float64)
        slack = 2e-5 * float(wanted.max()) if len(expected) else 0.0
        close = 5e-3 if self.mode.dtype is torch.bfloat16 else 2e-3  # one more rounding: of P's longer step
        torch.testing.assert_close(torch.tensor(fast, dtype=torch.float64), wanted, rtol=close, atol=slack)
        self.compared += 1

    def compare_weights(self, step, weights):
        oracle, config = self.oracle, self.config
        if oracle.zeroes():
            weights = oracle.pruned_weights(weights)
        if oracle.removes():
            weights = oracle.remove(weights)
        if oracle.allocates and (config.reorthonormalize or step == oracle.end):
            for m in oracle.modules:
                m.forget()
        handed_over = config.handover and oracle.ends and step == config.warmup - 1
        loose, same = self.mode.dtype is torch.bfloat16, ([], [])
        for m, expected in zip(oracle.modules, weights):
            if not m.rank:
                assert m.adapter not in m.layer.lora_A
                continue
            most = min(m.d_out, m.d_in) // m.groups
            turned = config.reorthonormalize and oracle.allocates and 1 < sum(m.live) <= most
            if not handed_over and not turned:
                same[0].append(m.matrices())
                same[1].append(expected)
            elif not loose:
                length = 1.0 if m.own_lambda else m.length
                for mine, theirs in zip(m.by_group(m.matrices()), m.by_group(expected)):
                    as_singular_vectors(mine, theirs, m.live, length=length)
        close = {"rtol": 1e-2, "atol": 1e-3} if loose else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(flat(same[0]), flat(same[1]), **close)
        assert [h.live_rank for h in self.controller.handles] == [sum(m.live) for m in oracle.modules]

    def go(self):
        self.masks = set()
        for step in range(STEPS):
            self.backward(step)
            self.step(step)


# Two options at once, each of which has a mode of its own: on demand, `-m slow`.
COMBINED = re.compile(r"budget_\w+_svd|\w+_parameters(_\w+)?|(?!squared|released)\w+_before|\w+_no_handover")
TABLE = [pytest.param(name, marks=pytest.mark.slow) if COMBINED.fullmatch(name) else name for name in MODES]


# True of the ratio, which is dimensionless noise near a minimum, and of small models with odd settings.
@pytest.mark.filterwarnings("ignore::adalora.errors.AdaLoraWarning")
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
@pytest.mark.parametrize("name", TABLE)
def test_controller_and_oracle_agree_at_every_step(name):
    run = Run(MODES[name])
    run.go()
    oracle, config = run.oracle, run.config
    assert run.controller.step == STEPS
    assert run.controller.allocations == len(run.decisions)
    if config.schedule == "constant":
        assert not run.decisions
        return
    assert run.near_ties <= 0.1 * len(run.decisions)
    spent = [
        sum(p * sum(m.live) for p, m, g in zip(oracle.prices, oracle.modules, oracle.groups) if g == k)
        for k in range(len(oracle.targets))
    ]
    for used, target in zip(spent, oracle.targets):
        assert target - max(oracle.prices) < used <= target
    if config.importance not in ("magnitude", "lambda_magnitude", "random"):
        assert run.compared + (0 if config.handover else WARMUP) >= 100
