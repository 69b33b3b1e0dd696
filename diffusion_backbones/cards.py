def card(declaration): return "x"
