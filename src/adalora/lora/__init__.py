"""The only code that knows PEFT's layers, and optimizers' state: where P, λ and Q live, how they run, score and shrink.

No schedule and no decision is made here. Each folder is told in its `__init__.py`; docs/architecture.md has them all.
"""
