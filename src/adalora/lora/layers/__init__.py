"""A layer with triplets: where P, λ and Q lie in PEFT, how it runs, and what its LoraConfig and its base tell."""
