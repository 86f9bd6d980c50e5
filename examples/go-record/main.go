// Record asks a running server for a record: the JSON schema of a struct constrains the answer, which
// then fills the struct. Usage: record ADDRESS.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"time"

	"example.com/mlxrunner/runnerpb"
	"github.com/invopop/jsonschema"
	_ "google.golang.org/genproto/googleapis/rpc/errdetails" // the types returned by Details()
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// Person is the record. The tags bound it, so that the answer ends within num_predict.
type Person struct {
	Name string   `json:"name" jsonschema:"minLength=1,maxLength=20"`
	Age  int      `json:"age" jsonschema:"minimum=0,maximum=150"`
	Pets []string `json:"pets" jsonschema:"maxItems=2,enum=cat,enum=dog"`
}

func main() {
	connection := must(grpc.NewClient(os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials())))
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute) // the server sets no deadline
	defer cancel()
	schema := must(json.Marshal((&jsonschema.Reflector{DoNotReference: true}).Reflect(&Person{})))
	request := &runnerpb.ChatRequest{
		Messages:   []*runnerpb.ChatMessage{{Role: runnerpb.Role_ROLE_USER, Content: new("Ada is 36 years old and has a cat.")}},
		Options:    &runnerpb.CompletionOptions{Temperature: new(float32(0)), NumPredict: new(int32(400))},
		Constraint: &runnerpb.Constraint{Kind: &runnerpb.Constraint_JsonSchema{JsonSchema: string(schema)}},
	}
	stream := must(runnerpb.NewRunnerServiceClient(connection).Chat(ctx, request))
	text := ""
	chunk := &runnerpb.ChatResponse{}
	for !chunk.GetDone() {
		chunk = must(stream.Recv()) // io.EOF before `done` is a failure
		text += chunk.GetContent()
	}
	if !chunk.GetConstraintSatisfied() { // num_predict or the context ended the answer
		log.Fatalf("the answer ended too early (%s): %s", chunk.GetDoneReason(), text)
	}
	var person Person
	check(json.Unmarshal([]byte(text), &person))
	fmt.Printf("name %q, age %d, pets %q\n", person.Name, person.Age, person.Pets)
}

func must[T any](value T, err error) T { check(err); return value }

func check(err error) {
	if err != nil {
		log.Fatal(err, status.Convert(err).Details()) // includes the ErrorInfo with the reason
	}
}
