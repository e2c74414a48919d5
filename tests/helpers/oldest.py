"""What the lowest allowed versions of other packages cannot do, seen with `make test-oldest`: reasons to skip."""

from importlib.metadata import version
from importlib.util import find_spec

import pytest
from packaging.version import Version


def needs(package):
    """Skip where a package that only tests use is not installed."""
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


def from_version(package, lowest, reason):
    """Skip below a version of a package."""
    return pytest.mark.skipif(Version(version(package)) < Version(lowest), reason=reason)


shards_on_cpu = from_version("torch", "2.7", "torch 2.6 shards on accelerators only")
autocast_on_meta = from_version("torch", "2.7", "torch 2.6 knows no autocast on meta")
checkpoint_of_ddp_on_cpu = from_version("torch", "2.7", "torch 2.6 cannot load what the Trainer's DDP saved on cpu:0")
compiled_models = from_version("transformers", "5.3", "transformers 5.2's models miss a name where they are compiled")
loads_every_adapter = from_version("transformers", "5.3", "transformers 5.2 loads heads and groups wrongly or not")
