"""Operations on tensors and modules that know no family of networks: recording, truncation, noise, pyramids, files."""
