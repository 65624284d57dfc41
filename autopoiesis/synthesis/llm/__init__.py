"""Language models as authors of policies: what is asked, what it costs, what came back."""
