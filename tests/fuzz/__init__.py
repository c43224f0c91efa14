"""A seeded differential fuzzer of the hypergradients: random small problems against plain torch."""
