package main

import (
	"context"
	"encoding/json"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"example.com/mlxrunner/runnerpb"
)

const (
	statusInterval = 20 * time.Millisecond
	statusTimeout  = 20 * time.Second
)

// watch asks for Status until a call has ended, and once more.
func (s *session) watch(call *call) (result, error) {
	statuses := []json.RawMessage{}
	for running := true; running; time.Sleep(statusInterval) {
		running = call.running()
		status, err := s.status()
		if err != nil {
			return result{}, err
		}
		text, err := protojson.Marshal(status)
		if err != nil {
			return result{}, err
		}
		statuses = append(statuses, text)
	}
	ended, err := call.result()
	ended.Statuses = statuses
	return ended, err
}

// untilStatus asks for Status until the given fields, JSON, have their values.
func (s *session) untilStatus(fields []byte) (result, error) {
	var names map[string]json.RawMessage
	if err := json.Unmarshal(fields, &names); err != nil {
		return result{}, err
	}
	wanted := &runnerpb.StatusResponse{}
	if err := protojson.Unmarshal(fields, wanted); err != nil {
		return result{}, err
	}
	for deadline := time.Now().Add(statusTimeout); ; time.Sleep(statusInterval) {
		status, err := s.status()
		if err != nil {
			return failed(err), nil
		}
		if agree(status, wanted, names) || time.Now().After(deadline) {
			text, err := protojson.Marshal(status)
			return result{Code: "OK", Messages: []json.RawMessage{text}}, err
		}
	}
}

func (s *session) status() (*runnerpb.StatusResponse, error) {
	ctx, cancel := context.WithTimeout(context.Background(), defaultTimeout)
	defer cancel()
	return s.client.Status(ctx, &runnerpb.StatusRequest{})
}

// agree tells whether two messages have the same values in the named fields.
func agree(one, other proto.Message, names map[string]json.RawMessage) bool {
	a, b := one.ProtoReflect(), other.ProtoReflect()
	for name := range names {
		field := a.Descriptor().Fields().ByName(protoreflect.Name(name))
		if !a.Get(field).Equal(b.Get(field)) {
			return false
		}
	}
	return true
}
