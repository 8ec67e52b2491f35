"""Everything that runs torch. Nothing but the command line imports this room, so the generator needs no torch."""
