"""What people and judges say of responses: questions, verdicts, files of labels, agreement. No model is loaded here."""
