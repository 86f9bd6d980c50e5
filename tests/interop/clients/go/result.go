package main

import (
	"encoding/json"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/status"
)

// result is what became of a step.
type result struct {
	Broken   string            `json:"broken,omitzero"`
	Code     string            `json:"code,omitzero"`
	Message  string            `json:"message,omitzero"`
	Messages []json.RawMessage `json:"messages,omitzero"`
	Statuses []json.RawMessage `json:"statuses,omitzero"`
	Details  *details          `json:"details,omitzero"`
}

// details are those parts of the error's google.rpc.Status that it has.
type details struct {
	Reason       string            `json:"reason,omitzero"`
	Domain       string            `json:"domain,omitzero"`
	Metadata     map[string]string `json:"metadata,omitzero"`
	Violations   []violation       `json:"violations,omitzero"`
	RetrySeconds *float64          `json:"retry_seconds,omitzero"`
}

type violation struct {
	Field       string `json:"field"`
	Description string `json:"description"`
}

// broken is the result of a step that this client could not take.
func broken(err error) result { return result{Broken: err.Error()} }

// failed is the result of a call that ended with an error.
func failed(err error) result {
	status := status.Convert(err)
	failed := result{
		Code:     code.Code(status.Code()).String(),
		Message:  status.Message(),
		Messages: []json.RawMessage{},
	}
	if parts := status.Details(); len(parts) > 0 {
		failed.Details = &details{}
		for _, part := range parts {
			failed.Details.add(part)
		}
	}
	return failed
}

func (d *details) add(part any) {
	switch part := part.(type) {
	case *errdetails.ErrorInfo:
		d.Reason, d.Domain, d.Metadata = part.GetReason(), part.GetDomain(), part.GetMetadata()
	case *errdetails.BadRequest:
		for _, found := range part.GetFieldViolations() {
			d.Violations = append(d.Violations, violation{found.GetField(), found.GetDescription()})
		}
	case *errdetails.RetryInfo:
		delay := part.GetRetryDelay().AsDuration().Seconds()
		d.RetrySeconds = &delay
	}
}
