package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"math"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"example.com/mlxrunner/runnerpb"
)

// receive returns the next message of an answer, and io.EOF after the last one.
type receive func() (proto.Message, error)

// rpc sends a request. Its error is that the request, JSON, is none; how the call went is
// what receive tells.
type rpc func(ctx context.Context, request []byte) (receive, error)

func rpcs(client runnerpb.RunnerServiceClient) map[string]rpc {
	return map[string]rpc{
		"Load":       unary(client.Load),
		"Unload":     unary(client.Unload),
		"Status":     unary(client.Status),
		"Completion": stream(client.Completion),
		"Chat":       stream(client.Chat),
		"Embed":      unary(client.Embed),
		"RenderChat": unary(client.RenderChat),
		"Tokenize":   unary(client.Tokenize),
		"Detokenize": unary(client.Detokenize),
	}
}

// messageOf is a pointer to T that is a message.
type messageOf[T any] interface {
	*T
	proto.Message
}

func unary[T any, Request messageOf[T], Response proto.Message](
	method func(context.Context, Request, ...grpc.CallOption) (Response, error),
) rpc {
	return func(ctx context.Context, text []byte) (receive, error) {
		request := Request(new(T))
		if err := protojson.Unmarshal(text, request); err != nil {
			return nil, err
		}
		answered := false
		return func() (proto.Message, error) {
			if answered {
				return nil, io.EOF
			}
			answered = true
			return method(ctx, request)
		}, nil
	}
}

func stream[T any, Request messageOf[T], U any, Response messageOf[U]](
	method func(context.Context, Request, ...grpc.CallOption) (grpc.ServerStreamingClient[U], error),
) rpc {
	return func(ctx context.Context, text []byte) (receive, error) {
		request := Request(new(T))
		if err := protojson.Unmarshal(text, request); err != nil {
			return nil, err
		}
		answers, err := method(ctx, request)
		return func() (proto.Message, error) {
			if err != nil {
				return nil, err
			}
			answer, err := answers.Recv()
			return Response(answer), err
		}, nil
	}
}

// call is read to its end in the background.
type call struct {
	cancel context.CancelFunc

	mu       sync.Mutex
	changed  *sync.Cond
	messages []proto.Message
	err      error // io.EOF if it ended well; nil while it runs
}

func begin(rpc rpc, request []byte, timeout time.Duration) (*call, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	receive, err := rpc(ctx, request)
	if err != nil {
		cancel()
		return nil, err
	}
	c := &call{cancel: cancel}
	c.changed = sync.NewCond(&c.mu)
	go c.read(receive)
	return c, nil
}

func (c *call) read(receive receive) {
	defer c.cancel()
	for c.running() {
		message, err := receive()
		c.mu.Lock()
		if err == nil {
			c.messages = append(c.messages, message)
		}
		c.err = err
		c.changed.Broadcast()
		c.mu.Unlock()
	}
}

func (c *call) running() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err == nil
}

// wait returns when the call has so many messages, or has ended.
func (c *call) wait(messages int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.err == nil && len(c.messages) < messages {
		c.changed.Wait()
	}
}

// result waits for the call's end.
func (c *call) result() (result, error) {
	c.wait(math.MaxInt)
	ended := result{Code: "OK"}
	if !errors.Is(c.err, io.EOF) {
		ended = failed(c.err)
	}
	ended.Messages = []json.RawMessage{}
	for _, message := range c.messages {
		text, err := protojson.Marshal(message)
		if err != nil {
			return result{}, err
		}
		ended.Messages = append(ended.Messages, text)
	}
	return ended, nil
}
