"""`python -m adalora`, which launchers such as `torchrun -m` start as well."""

from adalora.cli import main

main()
