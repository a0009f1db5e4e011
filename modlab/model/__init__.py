"What a Hugging Face model is to modlab: its layers, their weights, its text, its logits."
