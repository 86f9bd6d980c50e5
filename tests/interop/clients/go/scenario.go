package main

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"example.com/mlxrunner/runnerpb"
)

const defaultTimeout = 120 * time.Second

type server struct {
	Address string
	Token   string
}

type scenario struct {
	Name             string
	Server           string
	Token            *string
	KeepaliveSeconds float64 `json:"keepalive_seconds"`
	Steps            []step
}

type step struct {
	Op             string
	RPC            string
	As             string
	Of             string
	Request        json.RawMessage
	Fields         json.RawMessage
	TimeoutSeconds float64 `json:"timeout_seconds"`
	WatchStatus    bool    `json:"watch_status"`
	UntilMessages  int     `json:"until_messages"`
}

// session is a scenario that runs, on a channel of its own.
type session struct {
	client runnerpb.RunnerServiceClient
	rpcs   map[string]rpc
	calls  map[string]*call
}

func (s scenario) run(servers map[string]server) []result {
	results := make([]result, 0, len(s.Steps))
	conn, err := s.dial(servers)
	if err != nil {
		for range s.Steps {
			results = append(results, broken(err))
		}
		return results
	}
	defer conn.Close()
	client := runnerpb.NewRunnerServiceClient(conn)
	session := session{client, rpcs(client), map[string]*call{}}
	for _, step := range s.Steps {
		result, err := session.do(step)
		if err != nil {
			result = broken(err)
		}
		results = append(results, result)
	}
	return results
}

func (s scenario) dial(servers map[string]server) (*grpc.ClientConn, error) {
	server, ok := servers[s.Server]
	if !ok {
		return nil, fmt.Errorf("there is no server %q", s.Server)
	}
	options := []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	token := server.Token
	if s.Token != nil {
		token = *s.Token
	}
	if token != "" {
		options = append(options, grpc.WithPerRPCCredentials(bearer(token)))
	}
	if s.KeepaliveSeconds > 0 {
		pings := keepalive.ClientParameters{Time: seconds(s.KeepaliveSeconds)}
		options = append(options, grpc.WithKeepaliveParams(pings))
	}
	return grpc.NewClient(server.Address, options...)
}

// do takes a step. Its error is a defect of this client or of the scenario; how a call ended
// is part of the result.
func (s *session) do(step step) (result, error) {
	switch step.Op {
	case "call":
		call, err := s.begin(step)
		if err != nil {
			return result{}, err
		}
		if step.WatchStatus {
			return s.watch(call)
		}
		return call.result()
	case "start":
		call, err := s.begin(step)
		if err != nil {
			return result{}, err
		}
		s.calls[step.As] = call
		call.wait(step.UntilMessages)
		return result{}, nil
	case "cancel", "finish":
		call, ok := s.calls[step.Of]
		if !ok {
			return result{}, fmt.Errorf("no call was started as %q", step.Of)
		}
		if step.Op == "cancel" {
			call.cancel()
		}
		return call.result()
	case "until_status":
		return s.untilStatus(step.Fields)
	}
	return result{}, fmt.Errorf("unknown op %q", step.Op)
}

func (s *session) begin(step step) (*call, error) {
	rpc, ok := s.rpcs[step.RPC]
	if !ok {
		return nil, fmt.Errorf("unknown rpc %q", step.RPC)
	}
	request, err := expand(step.Request)
	if err != nil {
		return nil, err
	}
	timeout := defaultTimeout
	if step.TimeoutSeconds > 0 {
		timeout = seconds(step.TimeoutSeconds)
	}
	return begin(rpc, request, timeout)
}

// bearer is a token, sent with every call.
type bearer string

func (token bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(token)}, nil
}

func (bearer) RequireTransportSecurity() bool { return false }

func seconds(number float64) time.Duration {
	return time.Duration(number * float64(time.Second))
}
