// Client runs scenarios against servers and prints one line of results for each.
// Its contract is the README of tests/interop.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
)

type outcome struct {
	Scenario string   `json:"scenario"`
	Results  []result `json:"results"`
}

func main() {
	log.SetFlags(0)
	if len(os.Args) != 3 {
		log.Fatal("usage: client SCENARIOS SERVERS")
	}
	if err := run(os.Args[1], os.Args[2], os.Stdout); err != nil {
		log.Fatal(err)
	}
}

func run(scenariosPath, serversPath string, out io.Writer) error {
	var scenarios []scenario
	var servers map[string]server
	err := errors.Join(readJSON(scenariosPath, &scenarios), readJSON(serversPath, &servers))
	if err != nil {
		return err
	}
	lines := json.NewEncoder(out)
	for _, scenario := range scenarios {
		if err := lines.Encode(outcome{scenario.Name, scenario.run(servers)}); err != nil {
			return err
		}
	}
	return nil
}

func readJSON(path string, into any) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, into); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
