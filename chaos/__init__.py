"""The chaos kit: real processes, a steady load, faults, three counts that must agree, and a verdict."""
