"""Several methods on one task at equal size: suites, the methods themselves, statistics, tables and report."""
