"What can be attached to a model and dosed by one number."
