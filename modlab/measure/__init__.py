"What a dose costs and what it buys."
