"""The extract step on clusters that are not there: a discrete-event simulation of the real schedule."""
