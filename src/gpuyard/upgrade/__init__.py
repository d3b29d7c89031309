"""The change of a running fleet: who goes when, and the record of what was done. Nothing here touches a node."""
