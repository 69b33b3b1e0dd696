"""Other libraries' ways of asking for a backbone. Each file is imported only when its library is."""
