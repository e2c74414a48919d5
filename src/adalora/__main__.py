"""`python -m adalora`, and with it `torchrun -m adalora` and `accelerate launch -m adalora`."""

from adalora.cli import main

main()
