"""The method as pure functions on tensors: no modules, no PEFT, no I/O."""
