"""What shows that an output is what its recipe says: signed statements, audits, bills of materials."""
