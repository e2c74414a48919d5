"""The only code that knows PEFT's layers."""
