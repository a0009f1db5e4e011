"Figures and the explorer."
