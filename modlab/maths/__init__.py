"Tensors in, tensors out: knows no model, no file, no cache."
