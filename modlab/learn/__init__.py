"Where the numbers come from: activations, and training."
