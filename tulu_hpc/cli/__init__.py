"""The command line. Each verb parses, calls one function of a lower room, and holds no logic of its own."""
