"""The only code that knows PEFT's layers, and optimizers' state: where P, λ and Q live, how they run, score and shrink.

No schedule and no decision is made here.
"""
