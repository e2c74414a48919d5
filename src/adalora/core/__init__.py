"""The method's equations as pure functions on tensors: no modules, no PEFT, no I/O.

`reference` says them once more, slowly and literally; the tests compare.
"""
