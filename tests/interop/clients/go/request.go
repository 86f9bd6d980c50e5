package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
)

// expand writes out every {"$repeat": TEXT, "count": N} of a request.
func expand(request json.RawMessage) ([]byte, error) {
	if len(request) == 0 {
		return []byte("{}"), nil
	}
	decoder := json.NewDecoder(bytes.NewReader(request))
	decoder.UseNumber() // as int64 seeds are more than a float64 holds
	var value any
	if err := decoder.Decode(&value); err != nil {
		return nil, err
	}
	value, err := expanded(value)
	if err != nil {
		return nil, err
	}
	return json.Marshal(value)
}

func expanded(value any) (any, error) {
	var err error
	switch value := value.(type) {
	case map[string]any:
		if text, ok := value["$repeat"].(string); ok {
			return repeated(text, value["count"])
		}
		for key := range value {
			if value[key], err = expanded(value[key]); err != nil {
				return nil, err
			}
		}
	case []any:
		for i := range value {
			if value[i], err = expanded(value[i]); err != nil {
				return nil, err
			}
		}
	}
	return value, nil
}

func repeated(text string, count any) (string, error) {
	number, ok := count.(json.Number)
	if !ok {
		return "", fmt.Errorf("$repeat: the count is no number: %v", count)
	}
	times, err := number.Int64()
	if err != nil || times < 0 {
		return "", fmt.Errorf("$repeat: bad count %s", number)
	}
	return strings.Repeat(text, int(times)), nil
}
