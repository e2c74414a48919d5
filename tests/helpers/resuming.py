"""What tests of interrupted runs have in common: a run ends, saved and begun again, as if nothing had happened."""

import torch


def told(controller):
    """The history without its times."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in controller.history.records]


def outcome(model, controller):
    """All that a run leaves: weights, ranks, history."""
    return {k: v.clone() for k, v in model.state_dict().items()}, controller.ranks, told(controller)


def assert_equal(first, second):
    """Bit for bit."""
    assert first[1] == second[1]
    for mine, theirs in zip(first[2], second[2], strict=True):
        assert mine == theirs
    assert first[0].keys() == second[0].keys()
    assert all(torch.equal(value, second[0][key]) for key, value in first[0].items())


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def resumed(begin, train, *, steps, moment, optimizer_first, file):
    """The outcome of a run that is saved and begun anew after some of its steps.

    Args:
        begin: Gives the model and its controller.
        train: Takes model, optimizer and the numbers of the steps to take.
        steps: How many the run has.
        moment: After how many it is interrupted.
        optimizer_first: Whether the new optimizer is made before the controller has its state, or after.
        file: Where the state lies in between.
    """
    model, controller = begin()
    optimizer = adamw(model)
    train(model, optimizer, range(moment))
    torch.save({"optimizer": optimizer.state_dict(), "adalora": controller.state_dict()}, file)
    del model, controller, optimizer

    saved = torch.load(file, weights_only=True)
    torch.manual_seed(5)
    model, controller = begin()
    optimizer = adamw(model) if optimizer_first else None
    controller.load_state_dict(saved["adalora"])
    optimizer = optimizer or adamw(model)
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(moment, steps))
    controller.finalize()
    return outcome(model, controller)
