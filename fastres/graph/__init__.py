"""The intermediate representation: what a network is, how it is read, checked and rewritten."""
